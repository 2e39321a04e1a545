"""Parquet shards whose images are encoded bytes: a binary column, or the struct {bytes, path} that many published sets use.

A row group is the smallest piece that can be read. Under shuffling every record may lie in another one, so shards with small row groups (up to
about a hundred rows) are the fast ones; the last few row groups stay in memory.
"""
import bisect
from collections import OrderedDict
from collections.abc import Sequence
import os
import threading
from typing import Any

from vlm_jax.data.files import MAX_BYTES, expand_paths
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import TEXT_NAMES, check_index, check_texts, class_text, offsets_of
from vlm_jax.errors import DataError, did_you_mean


class ParquetSource:
    """Records of parquet files.

    Args:
      path: a path, a pattern or a list of them, as for tar shards.
      image: column of the image: binary, or a struct with a field `bytes`.
      texts: column of the caption (string) or the captions (list of strings); by default the first of texts, captions, caption, text.
      label: column of a class number or name; without captions the texts are the class name.
      class_names: names of the class numbers.
      extras: further columns to keep.
      cached_groups: how many row groups stay in memory.
    Raises:
      DataError: at once for files that are missing, damaged, empty or without the needed columns; on access, with a `reason`, for a bad record:
        image_missing, file_too_large, file_unreadable, caption_missing, caption_not_text, caption_empty, label_unknown.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str], *, image: str = "image", texts: str | None = None, label: str | None = None,
                 class_names: Sequence[str] | None = None, extras: Sequence[str] = (), cached_groups: int = 8):
        import pyarrow as pa
        import pyarrow.parquet as pq
        self._paths = [os.path.abspath(p) for p in expand_paths(path, "parquet")]
        self.name = os.path.basename(self._paths[0]) + (f" and {len(self._paths) - 1} more" if len(self._paths) > 1 else "")
        self._image, self._label, self._extras = image, label, tuple(extras)
        self._class_names = list(class_names) if class_names is not None else None
        self._groups: list[tuple[int, int]] = []                   # (file, row group) of every row group
        lengths = []
        for number, file in enumerate(self._paths):
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"parquet {os.path.basename(file)}: {str(error).splitlines()[0]}; damaged or not parquet, copy it again.") from None
            columns = metadata.schema.to_arrow_schema().names
            if number == 0:
                texts = texts or next((name for name in TEXT_NAMES if name in columns), None if label else TEXT_NAMES[2])
            for name in (image, texts, label, *extras):
                if name is not None and name not in columns:
                    raise DataError(f'parquet {os.path.basename(file)}: there is no column "{name}".{did_you_mean(name, columns)} Set the column.')
            self._groups += [(number, group) for group in range(metadata.num_row_groups)]
            lengths += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._texts, self._offsets = texts, offsets_of(lengths)
        if not self._offsets[-1]:
            raise DataError(f"parquet {self.name}: it has no rows; name files that have.")
        self._cached_groups = max(1, cached_groups)
        self._forget()

    def _forget(self) -> None:
        self._lock, self._tables = threading.Lock(), OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self._offsets[-1]

    def describe(self, index: int) -> str:
        file = self._groups[self._group(index)][0]
        first = next(i for i, (number, _) in enumerate(self._groups) if number == file)
        return f"{os.path.basename(self._paths[file])}:row {index - self._offsets[first]}"

    def texts_at(self, index: int) -> list[str]:
        index = check_index(index, len(self), self.name)
        return self._words(index, *self._place(index))["texts"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        table, row = self._place(index)
        image = table[self._image][row].as_py()
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes) or not image:
            raise problem("image_missing", f'{self.describe(index)}: "{self._image}" holds no image bytes; store the encoded picture.')
        if len(image) > MAX_BYTES:
            raise problem("file_too_large", f"{self.describe(index)}: {len(image)} bytes, over the limit of {MAX_BYTES}; shrink the picture.")
        return {"image": image, **self._words(index, table, row), **{key: table[key][row].as_py() for key in self._extras}}

    def _words(self, index: int, table: Any, row: int) -> dict[str, Any]:
        words: dict[str, Any] = {}

        def item() -> str:
            return self.describe(index)
        if self._label is not None:
            label, text = class_text(table[self._label][row].as_py(), self._class_names, item)
            words["texts"] = [text]
            if label is not None:
                words["label"] = label
        if self._texts is not None:
            words["texts"] = check_texts(table[self._texts][row].as_py(), item)
        return words

    def _group(self, index: int) -> int:
        return bisect.bisect_right(self._offsets, index) - 1

    def _place(self, index: int) -> tuple[Any, int]:
        """Returns (the row group as a table, the row in it)."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        group = self._group(index)
        with self._lock:
            table = self._tables.get(group)
            if table is not None:
                self._tables.move_to_end(group)
        if table is None:
            number, in_file = self._groups[group]
            columns = list({name: None for name in (self._image, self._texts, self._label, *self._extras) if name is not None})
            try:
                # One thread each: the loader's threads are the parallelism.
                with pq.ParquetFile(self._paths[number]) as file:
                    table = file.read_row_group(in_file, columns=columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise problem("file_unreadable", f"{self.describe(index)}: {str(error).splitlines()[0]}; copy the file again.") from error
            with self._lock:
                self._tables[group] = table
                while len(self._tables) > self._cached_groups:
                    self._tables.popitem(last=False)
        return table, index - self._offsets[group]
