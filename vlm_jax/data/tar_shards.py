"""Webdataset tar shards as a random-access source, by a reader of our own.

A sample is the run of members that share a key: `000017.jpg`, `000017.txt`, `000017.json`. Headers are read once into an index, which is kept
beside the shard (or in the folder that VLM_JAX_CACHE names) and checked against the shard's size and time; records are then read by position. Shards on an
object store are indexed block by block, many at once, and a record of theirs is read by one request.
Nothing is extracted, unpickled or executed, no link is followed, and a member's name is never used as a path.
"""
from collections.abc import Callable, Sequence
from functools import partial
import json
import logging
import os
from typing import Any

import numpy as np

from vlm_jax.data.files import MAX_BYTES, expand_paths, read_span
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import TEXT_NAMES, check_index, check_texts, class_text, locate_part, offsets_of
from vlm_jax.data.tar_index import ABSENT, IMAGE_ENDINGS, KINDS, MAX_TEXT_BYTES, opened, read_members, shard_indexes, split_key
from vlm_jax.errors import DataError
from vlm_jax.storage import is_remote

_SLACK_BYTES = 2**20      # of other members, read along with a sample's
_NAME_BLOCK = 16 * 2**10  # bytes of the request that finds out a sample's name


class TarSource:
    """Samples of webdataset shards: an image (jpg, jpeg, png, webp), captions (.txt, or .json with caption, captions, text or texts), a label (.cls).

    Args:
      path: a path, a pattern (`shards-{000..010}.tar`, `*.tar`) or a list of them; local files, or gs:// and s3:// (with gcsfs or s3fs installed).
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
        self._paths = [p if is_remote(p) else os.path.abspath(p) for p in expand_paths(path, "tar", remote=True)]
        self.name = os.path.basename(self._paths[0]) + (f" and {len(self._paths) - 1} more" if len(self._paths) > 1 else "")
        self._texts, self._max_bytes = texts, max_bytes
        self._class_names = list(class_names) if class_names is not None else None
        indexes = shard_indexes(self._paths)
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
            with opened(path, self._span(index)[1], _NAME_BLOCK) as file:
                member = next(read_members(file, int(self._samples[index][0])), None)
        except (OSError, DataError):
            member = None
        return f"{os.path.basename(path)}:{split_key(member.name)[0]}" if member else f"{os.path.basename(path)}[{index - self._offsets[shard]}]"

    def texts_at(self, index: int) -> list[str]:
        return self._words(check_index(index, len(self), self.name))["texts"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        read = self._reader(index)
        image = self._member(index, "image", self._max_bytes, read)
        if image is None:
            raise problem("image_missing", f"{self.describe(index)}: no {', '.join(IMAGE_ENDINGS)} member; add it or write the shard again.")
        return {"image": image, **self._words(index, read)}

    def _reader(self, index: int) -> Callable[..., bytes]:
        """Returns `read_span` for this sample's members; on an object store one that has read them all by one request, where little else lies between."""
        path = self._paths[locate_part(self._offsets, index)[0]]
        read = partial(read_span, path)
        if is_remote(path):
            first, last, held = self._span(index)
            if last - first <= min(self._max_bytes, held + _SLACK_BYTES):
                try:
                    data = read(first, last - first, "")
                except DataError:                                     # member by member, so that the error names the sample and spares the others
                    return read
                return lambda offset, size, item, max_bytes: read(0, size, item, max_bytes) if size > max_bytes else data[offset - first:offset - first + size]
        return read

    def _span(self, index: int) -> tuple[int, int, int]:
        """Returns where the sample's members begin and end, and their bytes."""
        members = [(int(offset), int(size)) for offset, size in self._samples[index][1:].reshape(-1, 2) if offset != ABSENT]
        return min(offset for offset, _ in members), max(offset + size for offset, size in members), sum(size for _, size in members)

    def _member(self, index: int, kind: str, max_bytes: int, read: Callable[..., bytes] | None = None) -> bytes | None:
        offset, size = (int(value) for value in self._samples[index][1 + 2 * KINDS.index(kind):][:2])
        if offset == ABSENT:
            return None
        read = read or partial(read_span, self._paths[locate_part(self._offsets, index)[0]])
        try:
            return read(offset, size, "", max_bytes)
        except DataError as error:                                # name the sample only when there is something to say: it costs a read
            raise problem(error.reason, f"{self.describe(index)}{error}") from error

    def _text(self, index: int, kind: str, read: Callable[..., bytes] | None) -> str | None:
        data = self._member(index, kind, MAX_TEXT_BYTES, read)
        try:
            return None if data is None else data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise problem("caption_not_utf8", f"{self.describe(index)}.{kind}: byte {error.start} is not UTF-8; write texts as UTF-8.") from error

    def _words(self, index: int, read: Callable[..., bytes] | None = None) -> dict[str, Any]:
        """Returns texts, and label where the sample has one."""
        words: dict[str, Any] = {}
        label, caption = self._text(index, "cls", read), self._text(index, "txt", read)
        if label is not None:
            number, text = class_text(label, self._class_names, lambda: f"{self.describe(index)}.cls")
            words["texts"] = [text]
            if number is not None:
                words["label"] = number
        if caption is not None:
            words["texts"] = check_texts(caption, lambda: f"{self.describe(index)}.txt")
            return words
        details = self._text(index, "json", read)
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
