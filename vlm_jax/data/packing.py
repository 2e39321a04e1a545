"""Packing: documents of another source joined to rows by a plan, so that a row has an index and every document is in one row of an epoch.

The plan is a pure function of (lengths, room, seed): documents in a random order, in windows, each of which is packed by first-fit decreasing (Johnson 1973).
The documents of a row do not see each other (`segment_ids`), read their own pictures only, and do not predict each other's first token.
"""
from collections.abc import Sequence
from functools import partial
import io
import os
from typing import Any

from jaxtyping import Int
import numpy as np

from vlm_jax import storage
from vlm_jax.data.interleaved import InterleavedFormat
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import Source, build_source, check_index, locate_part, offsets_of, texts_of
from vlm_jax.errors import ConfigError, DataError

WINDOW = 1000


def pack_plan(lengths: Int[np.ndarray, "N 2"], room: tuple[int, int, int], seed: Sequence[int] = (0,),
              window: int = WINDOW) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "P"]]:
    """Returns (documents in the order of their rows, offsets): row p holds documents[offsets[p]:offsets[p + 1]].

    Args:
      lengths: tokens and pictures of each document.
      room: tokens, pictures and documents that a row has room for.
      seed: of the random order.
      window: documents that are packed at a time; more fill rows better and mix less.
    Raises:
      DataError: naming the first document that fits no row.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    too_long = np.flatnonzero((lengths[:, 0] > room[0]) | (lengths[:, 1] > room[1]))
    if len(too_long):
        tokens, pictures = lengths[too_long[0]]
        raise DataError(f"packed: document {too_long[0]} has {tokens} tokens and {pictures} pictures, but a row has room for {room[0]} and {room[1]}; "
                        "measure it with the format that cuts it, or leave it out.")
    order = np.random.default_rng(tuple(seed)).permutation(len(lengths))
    documents, sizes = [], []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        part = part[np.argsort(-lengths[part, 0], kind="stable")]
        free = np.tile(np.asarray(room, np.int64), (len(part), 1))
        rows: list[list[int]] = []
        for document in part:
            need = (*lengths[document], 1)
            row = int(np.argmax((free >= need).all(axis=1)))          # an untouched row always has room
            free[row] -= need
            if row == len(rows):
                rows.append([])
            rows[row].append(int(document))
        documents += [document for row in rows for document in row]
        sizes += [len(row) for row in rows]
    return np.asarray(documents, np.int64), np.asarray(offsets_of(sizes), np.int64)


class PackedSource:
    """Rows of several documents; a record has `documents`, a list of records (a DataError in the place of one that cannot be read), and `name_of`.

    `Processor` joins them; a bad document is left out of its row and counted.
    """

    def __init__(self, source: Source, lengths: np.ndarray, room: tuple[int, int, int], seed: int, epochs: int, window: int):
        self.name, self._source = f"packed({source.name})", source
        self._plans = [pack_plan(lengths, room, (seed, epoch), window) for epoch in range(epochs)]
        self._offsets = offsets_of([len(offsets) - 1 for _, offsets in self._plans])
        self._room, self._tokens = room, int(np.sum(lengths[:, 0])) * epochs

    def __len__(self) -> int:
        return self._offsets[-1]

    def documents_at(self, index: int) -> list[int]:
        """Returns which documents row `index` holds."""
        epoch, row = locate_part(self._offsets, check_index(index, len(self), self.name))
        documents, offsets = self._plans[epoch]
        return documents[offsets[row]:offsets[row + 1]].tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = self.documents_at(index)
        return {"documents": [self._read(number) for number in numbers], "name_of": partial(self._name_of, index)}

    def texts_at(self, index: int) -> list[str]:
        return [text for number in self.documents_at(index) for text in texts_of(self._source, number)]

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these rows; `filled` is the share of their tokens that documents fill."""
        return {**getattr(self._source, "details", {"source": self._source.name}), "rows": len(self), "epochs": len(self._plans),
                "room": list(self._room), "filled": self._tokens / (len(self) * self._room[0])}

    def _read(self, number: int) -> Any:
        try:
            return self._source[number]
        except DataError as error:
            return error
        except OSError as error:
            return DataError(f"the file cannot be read ({error.strerror}); is it still there?")

    def _name_of(self, index: int, place: int) -> str:
        """Returns what messages call document `place` of row `index`."""
        return self._source.describe(self.documents_at(index)[place])


def measure(source: Source, processor: Processor) -> Int[np.ndarray, "N 2"]:
    """Returns tokens and pictures of every document under a processor, at most those of a row: of several texts of a plain record the longest.

    A document that cannot be used takes one token, so that it is in a row and is counted there. Every document is read once, by the source's `outline_at`,
    which spares its pictures, where there is one.
    """
    form, rows, read = processor.format, np.ones((len(source), 2), np.int64), getattr(source, "outline_at", source.__getitem__)
    rows[:, 1] = 0
    for index in range(len(source)):
        try:
            record = read(index)
            texts = record.get("texts") or [None]
            choices = [record] if "segments" in record else [{**record, "texts": [text]} for text in texts]
            rows[index] = np.max([form.measure(processor.segments(choice)) for choice in choices], axis=0)
        except (DataError, OSError):
            continue
    return rows


def packed_source(source: Any, processor: Any = None, lengths: Any = None, length: int | None = None, pictures: int = 0, documents: int | None = None,
                  seed: int = 0, epochs: int = 1, window: int = WINDOW) -> PackedSource:
    """Returns the documents of a source packed to rows.

    Args:
      source: the section of a source, or a source.
      processor: the section (or `Processor`) of the stream that reads the rows, whose format has `pack` above 1: documents are measured with it, and length,
        pictures and documents are those of its format.
      lengths: without a processor tokens and pictures of each document, [N, 2]; with one the .npy file that keeps them: read if it is there, else written.
      length, pictures, documents: without a processor: room of a row.
      seed: of the plan; epochs: how many passes, each with a plan of its own, the rows go through.
      window: see `pack_plan`.
    Raises:
      ConfigError: for settings that do not go together.
      DataError: for a file of lengths that are not those of the source.
    """
    source = build_source(source, "packed.source") if hasattr(source, "items") else source
    for name, value, low in (("seed", seed, 0), ("epochs", epochs, 1), ("window", window, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"packed.{name} is {value!r}; give a number of at least {low}.")
    if processor is not None:
        made = Processor(**dict(processor.items())) if hasattr(processor, "items") else processor
        form = made.format
        if not isinstance(form, InterleavedFormat) or form.packs < 2:
            raise ConfigError('packed.processor needs format.kind="interleaved" and format.pack of at least 2.')
        if length is not None or pictures or documents is not None:
            raise ConfigError("packed: length, pictures and documents are those of the processor's format; leave them out.")
        length, pictures, documents = form.length, form.pictures, form.packs
        if lengths is not None and not isinstance(lengths, (str, os.PathLike)):
            raise ConfigError("packed.lengths with a processor is the .npy file that keeps what is measured; give a path or leave it out.")
        lengths = _kept(lengths, source, made)
    elif lengths is None or length is None or documents is None:
        raise ConfigError("packed needs a processor, or lengths with length and documents; add them.")
    elif isinstance(lengths, (str, os.PathLike)):
        lengths = _load(os.path.expanduser(os.fspath(lengths)))
    lengths = np.asarray(lengths)
    if lengths.shape != (len(source), 2) or lengths.dtype.kind not in "iu" or (lengths < 0).any():
        raise DataError(f"packed: lengths are {lengths.dtype} {list(lengths.shape)}, but {source.name} has {len(source)} documents; "
                        "give whole numbers [documents, 2], tokens and pictures of each.")
    return PackedSource(source, lengths, (length, pictures, documents), seed, epochs, window)


def _kept(path: str | os.PathLike | None, source: Source, processor: Processor) -> np.ndarray:
    """Returns what `measure` gives, from its file or into it."""
    path = None if path is None else os.path.expanduser(os.fspath(path))
    if path is not None and os.path.exists(path):
        return _load(path)
    lengths = measure(source, processor)
    if path is not None:
        buffer = io.BytesIO()
        np.save(buffer, lengths, allow_pickle=False)
        storage.write_whole(path, buffer.getvalue())
    return lengths


def _load(path: str) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"packed.lengths: {path} cannot be read ({' '.join(str(error).split())[:100]}); remove it to measure again.") from None
