"""Webdataset tar shards as a random-access source, by a reader of our own.

A sample is the run of members that share a key: `000017.jpg`, `000017.txt`, `000017.json`. Headers are read once into an index, which is kept
beside the shard (or in the folder that VLM_JAX_CACHE names) and checked against the shard's size and time; records are then read by position.
Nothing is extracted, unpickled or executed, no link is followed, and a member's name is never used as a path.
"""
from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.data.files import MAX_BYTES, expand_paths, read_span
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import TEXT_NAMES, check_index, check_texts, class_text, locate_part, offsets_of
from vlm_jax.errors import DataError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
KINDS = ("image", "txt", "json", "cls")
INDEX_VERSION = 1
MAX_TEXT_BYTES = 2**20
_BLOCK = 512
_MAX_NAME_BYTES = 64 * 2**10
_MAX_POSITION = 2**62
_ABSENT = -1


class TarSource:
    """Samples of webdataset shards: an image (jpg, jpeg, png, webp), captions (.txt, or .json with caption, captions, text or texts), a label (.cls).

    Args:
      path: a path, a pattern (`shards-{000..010}.tar`, `*.tar`) or a list of them; local files.
      texts: the key of the captions in .json; by default the first of texts, captions, caption, text. A .txt member comes first.
      class_names: names of the class numbers in .cls; a sample without captions has its class name as text.
      max_bytes: limit of one member.
    Attributes:
      problems: one line for every shard that is cut or damaged; they are logged as warnings too. The whole samples before the cut are kept.
    Raises:
      DataError: at once for a missing or compressed shard, or shards without a single sample; on access, with a `reason`, for a bad sample:
        image_missing, caption_missing, caption_not_text, caption_empty, caption_not_utf8, row_not_json, label_unknown, file_too_large, file_cut.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str], *, texts: str | None = None, class_names: Sequence[str] | None = None,
                 max_bytes: int = MAX_BYTES):
        self._paths = [os.path.abspath(p) for p in expand_paths(path, "tar")]
        self.name = os.path.basename(self._paths[0]) + (f" and {len(self._paths) - 1} more" if len(self._paths) > 1 else "")
        self._texts, self._max_bytes = texts, max_bytes
        self._class_names = list(class_names) if class_names is not None else None
        indexes = [shard_index(path) for path in self._paths]
        self.problems = [index.problem for index in indexes if index.problem]
        for line in self.problems:
            logging.getLogger(__name__).warning(line)
        self._offsets = offsets_of([len(index.samples) for index in indexes])
        if not self._offsets[-1]:
            detail = self.problems[0] if self.problems else "no member is named KEY.jpg, KEY.txt or the like"
            raise DataError(f"tar {self.name}: it holds no whole sample ({detail}); check the shards.")
        self._samples = np.concatenate([index.samples for index in indexes])

    def __len__(self) -> int:
        return self._offsets[-1]

    def describe(self, index: int) -> str:
        shard, _ = locate_part(self._offsets, index)
        path = self._paths[shard]
        try:
            with open(path, "rb") as file:
                member = next(read_members(file, int(self._samples[index][0])), None)
        except (OSError, DataError):
            member = None
        return f"{os.path.basename(path)}:{split_key(member.name)[0]}" if member else f"{os.path.basename(path)}[{index - self._offsets[shard]}]"

    def texts_at(self, index: int) -> list[str]:
        return self._words(check_index(index, len(self), self.name))["texts"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        image = self._member(index, "image", self._max_bytes)
        if image is None:
            raise problem("image_missing", f"{self.describe(index)}: no {', '.join(IMAGE_ENDINGS)} member; add it or write the shard again.")
        return {"image": image, **self._words(index)}

    def _member(self, index: int, kind: str, max_bytes: int) -> bytes | None:
        offset, size = (int(value) for value in self._samples[index][1 + 2 * KINDS.index(kind):][:2])
        if offset == _ABSENT:
            return None
        shard, _ = locate_part(self._offsets, index)
        try:
            return read_span(self._paths[shard], offset, size, "", max_bytes)
        except DataError as error:                                # name the sample only when there is something to say: it costs a read
            raise problem(error.reason, f"{self.describe(index)}{error}") from error

    def _text(self, index: int, kind: str) -> str | None:
        data = self._member(index, kind, MAX_TEXT_BYTES)
        try:
            return None if data is None else data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise problem("caption_not_utf8", f"{self.describe(index)}.{kind}: byte {error.start} is not UTF-8; write texts as UTF-8.") from error

    def _words(self, index: int) -> dict[str, Any]:
        """Returns texts, and label where the sample has one."""
        words: dict[str, Any] = {}
        label, caption = self._text(index, "cls"), self._text(index, "txt")
        if label is not None:
            number, text = class_text(label, self._class_names, lambda: f"{self.describe(index)}.cls")
            words["texts"] = [text]
            if number is not None:
                words["label"] = number
        if caption is not None:
            words["texts"] = check_texts(caption, lambda: f"{self.describe(index)}.txt")
            return words
        details = self._text(index, "json")
        if details is not None:
            def item() -> str:
                return f"{self.describe(index)}.json"
            try:
                details = json.loads(details)
            except (ValueError, RecursionError) as error:
                raise problem("row_not_json", f"{item()}: it is not JSON ({error}); write the shard again.") from error
            if not isinstance(details, dict):
                raise problem("row_not_json", f"{item()}: it is a JSON {type(details).__name__}, not an object; write {{\"caption\": ...}}.")
            key = self._texts or next((name for name in TEXT_NAMES if name in details), None)
            if key in details or "texts" not in words:
                words["texts"] = check_texts(details.get(key), item)
        if "texts" not in words:
            raise problem("caption_missing", f"{self.describe(index)}: the sample has no .txt, .json or .cls member; add a caption.")
        return words


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Attributes:
      samples: int64 [N, 9], for each sample the position of its first header, then position and size of image, txt, json and cls, or -1.
      problem: one line about a shard that is cut or damaged, else "".
    """
    samples: np.ndarray
    problem: str


@dataclasses.dataclass(frozen=True)
class Member:
    """One regular file in a tar: its name, the positions of its first header and of its data, its size."""
    name: str
    header: int
    offset: int
    size: int


def shard_index(path: str) -> ShardIndex:
    """Returns the index of a shard: the stored one if it is of this very file, else a new one, which is stored where that is possible."""
    status = os.stat(path)
    stamp = (INDEX_VERSION, status.st_size, status.st_mtime_ns)
    stored = index_path(path)
    index = _load_index(stored, stamp)
    if index is None:
        index = build_index(path)
        _store_index(stored, stamp, index)
    return index


def index_path(path: str) -> str:
    """Returns where the index of a shard is kept: beside it, or in the folder that VLM_JAX_CACHE names."""
    cache = os.environ.get("VLM_JAX_CACHE")
    if not cache:
        return path + ".index.npz"
    digest = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    return os.path.join(os.path.expanduser(cache), "tar", f"{os.path.basename(path)}.{digest}.index.npz")


def build_index(path: str) -> ShardIndex:
    """Reads every header of a shard.

    Raises:
      DataError: for a compressed shard or a file that is no tar from its first byte.
    """
    name = os.path.basename(path)
    size = os.path.getsize(path)
    rows, row, key, trouble, cut_key = [], None, None, "", None
    with open(path, "rb") as file:
        magic = file.read(6)
        if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
            raise DataError(f"tar {name}: the shard is compressed, so it has no random access; unpack it to a plain .tar first.")
        try:
            for member in read_members(file):
                new_key, ending = split_key(member.name)
                if not ending:
                    continue
                if member.offset + member.size > size:
                    trouble, cut_key = f"cut inside {member.name[-100:]}", new_key
                    break
                if new_key != key:
                    key, row = new_key, [member.header] + [_ABSENT] * (2 * len(KINDS))
                    rows.append(row)
                kind = "image" if ending in IMAGE_ENDINGS else ending
                if kind in KINDS and row[1 + 2 * KINDS.index(kind)] == _ABSENT:
                    row[1 + 2 * KINDS.index(kind):3 + 2 * KINDS.index(kind)] = [member.offset, member.size]
        except DataError as error:
            trouble = str(error)
    lost = int(cut_key is not None)
    if trouble and rows and (cut_key == key if cut_key is not None else not _whole(rows[-1], rows[0])):
        rows.pop()                                                # its other members are gone, so it is not the sample that was written
        lost = 1
    rows = [row for row in rows if max(row[1:]) != _ABSENT]
    if trouble:
        if not rows and not lost:
            raise DataError(f"tar {name}: it is not a tar file ({trouble}); copy it again.")
        trouble = (f"tar {name}: {trouble}; kept {len(rows)} whole samples, dropped {lost} incomplete, what follows is lost: "
                   "copy the shard again.")
    return ShardIndex(np.array(rows, np.int64).reshape(-1, 1 + 2 * len(KINDS)), trouble)


def read_members(file: BinaryIO, start: int = 0) -> Iterator[Member]:
    """Yields the regular members from a header position on; folders, links, devices and sparse files are passed over.

    Raises:
      DataError: where the archive ends without its end mark or a header is damaged.
    """
    position, first, long_name, long_size, sparse = start, None, None, None, False
    while True:
        if position > _MAX_POSITION:
            raise DataError(f"damaged header at byte {first or start}")
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise DataError(f"cut at byte {position}")
        if not any(header):
            return
        size = _header_number(header[124:136])
        checksum = _header_number(header[148:156])
        if size is None or checksum != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise DataError(f"damaged header at byte {position}")
        kind, first = header[156:157], position if first is None else first
        data = position + _BLOCK
        if kind in (b"x", b"L", b"K", b"g"):
            position = data + -(-size // _BLOCK) * _BLOCK
            if kind in (b"x", b"L"):
                if size > (MAX_TEXT_BYTES if kind == b"x" else _MAX_NAME_BYTES):
                    raise DataError(f"damaged header at byte {first}")
                content = file.read(size)
                if len(content) < size:
                    raise DataError(f"cut at byte {data}")
                if kind == b"L":
                    long_name = _string(content)
                else:
                    fields = _pax_fields(content)
                    long_name, sparse = fields.get("path", long_name), any(key.startswith("GNU.sparse") for key in fields)
                    written = fields.get("size", "")
                    if written.isascii() and written.isdigit() and len(written) < 20:
                        long_size = int(written)
            continue
        name = long_name if long_name is not None else _string(header[:100])
        if long_name is None and header[257:262] == b"ustar" and header[257:265] != b"ustar  \0" and header[345]:
            name = f"{_string(header[345:500])}/{name}"
        size = size if long_size is None else long_size
        if kind in (b"0", b"\0", b"7"):
            if not sparse:
                yield Member(name, first, data, size)
        elif kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            size = 0
        position, first, long_name, long_size, sparse = data + -(-size // _BLOCK) * _BLOCK, None, None, None, False


def split_key(name: str) -> tuple[str, str]:
    """Returns (key, ending) as webdataset splits them, at the first dot of the last part; the ending is "" for hidden files and names without one."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower() if stem else ""


def _whole(last: list[int], first: list[int]) -> bool:
    """Whether the last sample before a cut has an image, something to say about it, and all the kinds of member that the first sample has."""
    image, *words = last[1::2]
    return image != _ABSENT and max(words) != _ABSENT and all(mine != _ABSENT for mine, usual in zip(last[1::2], first[1::2]) if usual != _ABSENT)


def _string(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _header_number(field: bytes) -> int | None:
    """Returns a number of a header, octal or base 256; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if not text:
        return 0
    return int(text, 8) if all(48 <= c <= 55 for c in text) else None


def _pax_fields(content: bytes) -> dict[str, str]:
    """Returns the records `LENGTH KEY=VALUE\\n` of a pax header, as far as they are well formed."""
    fields, position = {}, 0
    while position < len(content):
        length, space, _ = content[position:position + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, equals, value = content[position + len(length) + 1:position + int(length) - 1].partition(b"=")
        if equals:
            fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        position += int(length)
    return fields


def _load_index(stored: str, stamp: tuple[int, int, int]) -> ShardIndex | None:
    try:
        with np.load(stored, allow_pickle=False) as arrays:
            # A planted one could inflate to any size; a true one is smaller than its shard.
            if any(member.file_size > stamp[1] + 65_536 for member in arrays.zip.infolist()):
                return None
            if tuple(arrays["stamp"].tolist()) != stamp:
                return None
            samples, trouble = arrays["samples"], str(arrays["problem"])
    except Exception:   # whatever is wrong with it (zip, compression, headers, no zip at all), reading the shard again mends it
        return None
    if samples.dtype != np.int64 or samples.ndim != 2 or samples.shape[1] != 1 + 2 * len(KINDS):
        return None
    offsets, sizes = samples[:, 1::2], samples[:, 2::2]
    if (samples < _ABSENT).any() or (samples > stamp[1]).any() or (offsets + sizes > stamp[1]).any() or ((offsets < 0) != (sizes < 0)).any():
        return None
    return ShardIndex(samples, trouble)


def _store_index(stored: str, stamp: tuple[int, int, int], index: ShardIndex) -> None:
    try:
        os.makedirs(os.path.dirname(stored), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(stored), suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez_compressed(file, stamp=np.array(stamp, np.int64), samples=index.samples, problem=np.array(index.problem))
            os.replace(temporary, stored)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        logging.getLogger(__name__).info("The index of %s cannot be stored (%s); it is read again next time.", stored, error)
