"""Where the samples of a webdataset shard lie: an index of its headers, made once and kept.

Nothing is extracted, no link is followed, and a member's name is never used as a path.
"""
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
from functools import partial
import hashlib
import io
import logging
import os
import tempfile
from typing import BinaryIO

import numpy as np

from vlm_jax import storage
from vlm_jax.data.files import RangeReader, listed
from vlm_jax.errors import DataError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
KINDS = ("image", "txt", "json", "cls")
ABSENT = -1
INDEX_VERSION = 1
MAX_TEXT_BYTES = 2**20
_BLOCK = 512
_INDEX_BLOCK = 4 * 2**20     # bytes of one request while indexing
_REMOTE_AT_ONCE = 16         # shards of an object store that are indexed at a time: at most 64 MiB of blocks
_MAX_NAME_BYTES = 64 * 2**10
_MAX_POSITION = 2**62


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


def shard_indexes(paths: Sequence[str]) -> list[ShardIndex]:
    """Returns the indexes of shards, of those on object stores several at a time."""
    listings: dict[str, dict[str, tuple[int, int]]] = {}
    for path in paths:
        if storage.is_remote(path):
            listed(path.rpartition("/")[0], "tar", listings)
    with ThreadPoolExecutor(_REMOTE_AT_ONCE if listings else 1) as pool:
        return list(pool.map(partial(shard_index, listings=listings), paths))


def shard_index(path: str, listings: dict[str, dict[str, tuple[int, int]]] | None = None) -> ShardIndex:
    """Returns the index of a shard: the stored one if it is of this very file, else a new one, which is stored where that is possible.

    Args:
      listings: what `files.listed` has found of the folders on object stores.
    """
    if storage.is_remote(path):
        folder, _, name = path.rpartition("/")
        stamp = (INDEX_VERSION, *listed(folder, "tar", {} if listings is None else listings)[name])
    else:
        status = os.stat(path)
        stamp = (INDEX_VERSION, status.st_size, status.st_mtime_ns)
    stored = index_path(path)
    index = _load_index(stored, stamp)
    if index is None:
        index = build_index(path, stamp[1])
        _store_index(stored, stamp, index)
    return index


def index_path(path: str) -> str:
    """Returns where the index of a shard is kept: beside it, or in the folder that VLM_JAX_CACHE names."""
    cache = os.environ.get("VLM_JAX_CACHE")
    if not cache:
        return path + ".index.npz"
    digest = hashlib.sha256((path if storage.is_remote(path) else os.path.realpath(path)).encode()).hexdigest()[:16]
    return os.path.join(os.path.expanduser(cache), "tar", f"{os.path.basename(path)}.{digest}.index.npz")


@contextlib.contextmanager
def opened(path: str, size: int, block: int | None = None) -> Iterator[BinaryIO | RangeReader]:
    """Gives what `read_members` reads a shard by; of one on an object store at most `size` bytes, `block` bytes a request (by default 4 MiB)."""
    if storage.is_remote(path):
        yield RangeReader(path, size, block or _INDEX_BLOCK)
    else:
        with open(path, "rb") as file:
            yield file


def build_index(path: str, size: int | None = None) -> ShardIndex:
    """Reads every header of a shard; `size` is its bytes, needed of one on an object store.

    Raises:
      DataError: for a compressed shard or a file that is no tar from its first byte.
    """
    name = os.path.basename(path)
    size = os.path.getsize(path) if size is None else size
    rows, row, key, trouble, cut_key = [], None, None, "", None
    with opened(path, size) as file:
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
                    key, row = new_key, [member.header] + [ABSENT] * (2 * len(KINDS))
                    rows.append(row)
                kind = "image" if ending in IMAGE_ENDINGS else ending
                if kind in KINDS and row[1 + 2 * KINDS.index(kind)] == ABSENT:
                    row[1 + 2 * KINDS.index(kind):3 + 2 * KINDS.index(kind)] = [member.offset, member.size]
        except DataError as error:
            trouble = str(error)
    lost = int(cut_key is not None)
    if trouble and rows and (cut_key == key if cut_key is not None else not _whole(rows[-1], rows[0])):
        rows.pop()                                                # its other members are gone, so it is not the sample that was written
        lost = 1
    rows = [row for row in rows if max(row[1:]) != ABSENT]
    if trouble:
        if not rows and not lost:
            raise DataError(f"tar {name}: it is not a tar file ({trouble}); copy it again.")
        trouble = (f"tar {name}: {trouble}; kept {len(rows)} whole samples, dropped {lost} incomplete, what follows is lost: "
                   "copy the shard again.")
    return ShardIndex(np.array(rows, np.int64).reshape(-1, 1 + 2 * len(KINDS)), trouble)


def read_members(file: BinaryIO | RangeReader, start: int = 0) -> Iterator[Member]:
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
    return image != ABSENT and max(words) != ABSENT and all(mine != ABSENT for mine, usual in zip(last[1::2], first[1::2]) if usual != ABSENT)


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
        content = io.BytesIO(storage.read(stored, limit=stamp[1] + 65_536) or b"") if storage.is_remote(stored) else stored
        with np.load(content, allow_pickle=False) as arrays:
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
    if (samples < ABSENT).any() or (samples > stamp[1]).any() or (offsets + sizes > stamp[1]).any() or ((offsets < 0) != (sizes < 0)).any():
        return None
    if (offsets == ABSENT).all(axis=1).any():
        return None
    return ShardIndex(samples, trouble)


def _store_index(stored: str, stamp: tuple[int, int, int], index: ShardIndex) -> None:
    try:
        if storage.is_remote(stored):
            content = io.BytesIO()
            np.savez_compressed(content, stamp=np.array(stamp, np.int64), samples=index.samples, problem=np.array(index.problem))
            storage.write(stored, content.getvalue())
            return
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
