"""A JSONL or CSV table beside a folder of images: the shortest way to train on one's own pictures.

    {"image": "cats/1.jpg", "caption": "a cat on a wall"}                 one JSON object a line, or
    image,caption                                                        a CSV file with a header
    cats/1.jpg,"a cat, on a wall"

The byte offset of every record is indexed once, so any record is read directly and the table may be larger than memory.
"""
from collections.abc import Iterator, Sequence
import csv
import io
import json
import os
from typing import Any

import numpy as np

from vlm_jax.data.files import inside, read_file, read_span
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import TEXT_NAMES, check_index, check_texts, class_text
from vlm_jax.errors import ConfigError, DataError, did_you_mean

MAX_LINE_BYTES = 2**20
_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}


class TableSource:
    """Records of a JSONL, CSV or TSV file whose images lie in a folder.

    Args:
      path: the table, UTF-8; its ending tells the format unless `format` does ("jsonl", "csv", "tsv").
      images: the folder that image paths are relative to; by default the table's own. Paths that lead out of it are refused.
      image: column of the image path; None: records of text alone.
      texts: column of the caption, or of the list of captions (JSONL); by default the first of texts, captions, caption, text that a record has.
      label: column of a class number or name. Without captions the texts are the class name.
      class_names: the names of the class numbers.
      extras: further columns besides `prompt` to keep in the records as they are.
    Raises:
      DataError: at once for a table that is missing, empty or without the needed columns; on access, with a `reason`, for a bad record: row_not_utf8,
        row_not_json, column_missing, image_missing, path_outside, caption_not_text, caption_empty, label_unknown and those of `files.read_span`.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, *, image: str | None = "image", texts: str | None = None,
                 label: str | None = None, class_names: Sequence[str] | None = None, extras: Sequence[str] = (), format: str | None = None):
        self._path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.name = os.path.basename(self._path)
        self._folder = os.path.abspath(os.path.expanduser(os.fspath(images))) if images is not None else os.path.dirname(self._path)
        self._image, self._texts, self._label, self._extras = image, texts, label, tuple(extras)
        self._class_names = list(class_names) if class_names is not None else None
        suffix = os.path.splitext(self._path)[1].lower()
        self._format = format or _FORMATS.get(suffix)
        if self._format not in ("jsonl", "csv", "tsv"):
            raise ConfigError(f'table {self.name}: the format "{self._format or suffix}" is unknown; set format to jsonl, csv or tsv.')
        if not os.path.isfile(self._path):
            raise DataError(f"table {self._path}: there is no such file; correct the path.")
        if not os.path.isdir(self._folder):
            raise DataError(f"table {self.name}: there is no image folder {self._folder}; set images to the folder of the pictures.")
        self._columns: list[str] = []
        index = line_index(self._path) if self._format == "jsonl" else self._index_csv()
        self._rows = np.array(list(index), np.int64).reshape(-1, 3)
        if not len(self._rows):
            raise DataError(f"table {self._path}: it has no records; write at least one.")

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self, index: int) -> str:
        return f"{self.name}:{self._rows[index][2]}"

    def texts_at(self, index: int) -> list[str]:
        index = check_index(index, len(self), self.name)
        return self._words(self._row(index), self.describe(index))["texts"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        item = self.describe(index)
        row = self._row(index)
        words = {**self._words(row, item), **{key: row[key] for key in ("prompt",) if key in row}, **{key: row.get(key) for key in self._extras}}
        if self._image is None:
            return words
        relative = self._column(row, self._image, item)
        if not isinstance(relative, str) or not relative:
            raise problem("image_missing", f'{item}: "{self._image}" is {relative!r}, not the path of a picture; write the path or remove the line.')
        image = read_file(inside(self._folder, relative, item), item)
        return {"image": image, **words}

    def _words(self, row: dict[str, Any], item: str) -> dict[str, Any]:
        """Returns texts, and label where the table has one."""
        column = self._texts or next((name for name in TEXT_NAMES if name in row), None)
        words = {}
        if self._label is not None:
            label, text = class_text(self._column(row, self._label, item), self._class_names, item)
            words["texts"] = [text]
            if label is not None:
                words["label"] = label
        if column is not None or self._label is None:
            words["texts"] = check_texts(self._column(row, column or TEXT_NAMES[2], item), item)
        return words

    def _column(self, row: dict[str, Any], name: str, item: str) -> Any:
        if name not in row:
            raise problem("column_missing", f'{item}: there is no "{name}".{did_you_mean(name, [key for key in row if key])} Add it or name another.')
        return row[name]

    def _row(self, index: int) -> dict[str, Any]:
        offset, size, _ = (int(value) for value in self._rows[index])
        item = self.describe(index)
        data = read_span(self._path, offset, size, item, MAX_LINE_BYTES)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise problem("row_not_utf8", f"{item}: byte {error.start} of the line is not UTF-8; save the table as UTF-8.") from error
        if self._format != "jsonl":
            values = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
            if len(values) != len(self._columns):
                raise problem("column_missing", f"{item}: {len(values)} fields, but the header has {len(self._columns)}; quote separators.")
            return dict(zip(self._columns, values))
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise problem("row_not_json", f"{item}: the line is not JSON ({error}); correct it or remove it.") from error
        if not isinstance(row, dict):
            raise problem("row_not_json", f"{item}: the line is a JSON {type(row).__name__}, not an object; name its fields.")
        return row

    @property
    def _delimiter(self) -> str:
        return "\t" if self._format == "tsv" else ","

    def _index_csv(self) -> Iterator[tuple[int, int, int]]:
        """Yields (offset, size, line number) of every record after the header; the csv module itself decides where a record ends."""
        position = [0, 0]                                   # bytes and lines that the reader has consumed

        def lines(file) -> Iterator[str]:
            for line in file:
                position[0] += len(line)
                position[1] += 1
                yield line.decode("utf-8", "surrogateescape")

        with open(self._path, "rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            position[0] = file.tell()
            reader = csv.reader(lines(file), delimiter=self._delimiter, strict=True)
            offset, number = 0, 0
            try:
                self._columns = [name.strip() for name in next(reader, [])]
                self._check_header()
                offset, number = position
                for values in reader:
                    if values:
                        yield offset, position[0] - offset, number + 1
                    offset, number = position
            except csv.Error as error:
                raise DataError(f"table {self.name}:{number + 1}: {error}; is a quote left open? Correct the line.") from error

    def _check_header(self) -> None:
        if not any(self._columns):
            raise DataError(f"table {self._path}: it has no header; write the names of the columns in the first line.")
        text = self._texts or next((name for name in TEXT_NAMES if name in self._columns), None)
        for name in (self._image, text or (None if self._label else TEXT_NAMES[2]), self._label, *self._extras):
            if name is not None and name not in self._columns:
                raise DataError(f'table {self.name}: there is no column "{name}".{did_you_mean(name, self._columns)} Rename it or set the column.')


def line_index(path: str) -> Iterator[tuple[int, int, int]]:
    """Yields (offset, size, line number) of every line of a file that is not blank; a byte order mark is passed over."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            if line[start:].strip():
                yield offset + start, len(line) - start, number
            offset += len(line)
