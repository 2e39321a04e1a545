"""The loader: a stream of numpy batches in which batch number n is a pure function of (seed, n).

The order comes from Grain: record positions are shuffled anew each epoch, cut into batches, and each batch of positions is read and processed as one
step by a thread or a worker process. Since every random draw is keyed by the seed and the example's place in the stream, batches do not depend on the
number of threads, workers or hosts, and the position of a run is one integer.
"""
from collections import Counter, deque
from collections.abc import Callable, Iterator
import gc
import multiprocessing
import os
import threading
import time
from typing import Any

from jaxtyping import Int64
import numpy as np

from vlm_jax import faults
from vlm_jax.data.buffers import Buffers
from vlm_jax.data.problems import Account, reason_of
from vlm_jax.data.sources import Source
from vlm_jax.errors import ConfigError, DataError

BUDGET_WINDOW = 10_000
_REPORT = "_report"
_PROBES = 64
# What stands in the rows of bad records and of padding: nothing is there, and a slot says so with -1.
_FILL = {"slots": -1, "media_index": -1}


class Loader:
    """Batches of a source through a processor.

    A batch is, for example, `{"image": [B, H, W, 3] float32, "tokens": [B, T] int32, "mask": [B] bool, "weight": [B] float32, "example_id": [B] int64}`:
    whatever arrays the processor makes, then whether the row holds an example, its weight in losses, and its index in the source (-1 in padding).

    Args:
      source: the records; it is read by many threads at once, and pickled into worker processes.
      processor: `processor(record, rng) -> {name: array}`, every array of one shape for all records.
      batch_size: rows of the global batch.
      seed: 0 ... 2**32 - 1.
      shuffle: a new order each epoch; else the order of the source.
      repeat: epochs follow each other without end, also within a batch; else one pass.
      drop_remainder: with one pass, whether the last rows that fill no batch are left out; else they are padded (mask False, example_id -1).
      augment: whether the processor gets an rng; by default as `shuffle`. Without it processing is deterministic and the first caption is taken.
      workers: worker processes; 0, the default, reads in this process. They are spawned, so a script needs `if __name__ == "__main__":`.
      threads: threads in each process; each prepares a batch of its own. 0 reads when asked.
      prefetch: how many batches are prepared ahead in each process, at least one for each thread.
      on_bad: "skip" keeps the place of a record that cannot be used, zeros with weight 0 and mask False, and counts it; "raise" stops at it.
      bad_budget: the share of bad records among the last 10,000 above which the run stops; at least one whole batch of them stops it too, if nothing
        good has come yet. 1 never stops.
      part: (k, n), this process reads the k-th of n contiguous blocks of ceil(B / n) rows of every batch. Where n does not divide B the last blocks have
        rows of padding (mask False, weight 0, example_id -1).
    Attributes:
      bad: Counter of reasons.
      bad_examples: the message of the first bad records.
      notes: Counter of what was done to records that are used: "document_cut", "pictures_cut" (`Processor.accounted`).
    Raises:
      ConfigError: for arguments that cannot work.
      DataError: for a source without records or without a single whole batch.
    """

    def __init__(self, source: Source, processor: Callable[..., dict[str, np.ndarray]], batch_size: int, seed: int = 0, *, shuffle: bool = True,
                 repeat: bool = True, drop_remainder: bool = True, augment: bool | None = None, workers: int = 0, threads: int = 2, prefetch: int = 2,
                 on_bad: str = "skip", bad_budget: float = 0.001, part: tuple[int, int] = (0, 1)):
        part = tuple(part)
        _check(isinstance(batch_size, int) and batch_size >= 1, "batch_size", batch_size, "a number, at least 1")
        _check(isinstance(seed, (int, np.integer)) and 0 <= seed < 2**32, "seed", seed, "a number from 0 to 2**32 - 1")
        _check(on_bad in ("skip", "raise"), "on_bad", on_bad, '"skip" or "raise"')
        _check(0 <= bad_budget <= 1, "bad_budget", bad_budget, "a share from 0 to 1")
        for name, value in (("workers", workers), ("threads", threads), ("prefetch", prefetch)):
            _check(isinstance(value, int) and value >= 0, name, value, "a number, at least 0")
        _check(len(part) == 2 and 0 <= part[0] < part[1], "part", part, "(k, n) with 0 <= k < n")
        if not len(source):
            raise DataError(f"{source.name}: it has no records; point the source at some.")
        if not repeat and drop_remainder and len(source) < batch_size:
            raise DataError(f"{source.name}: {len(source)} records make no batch of {batch_size}; lower batch_size or pad the remainder.")
        self.source, self.processor, self.batch_size, self.seed = source, processor, batch_size, int(seed)
        self.shuffle, self.repeat, self.drop_remainder = shuffle, repeat, drop_remainder
        self.augment = shuffle if augment is None else augment
        self.workers, self.threads, self.prefetch = workers, threads, prefetch
        self.on_bad, self.bad_budget, self.part = on_bad, float(bad_budget), part
        self.bad: Counter[str] = Counter()
        self.bad_examples: list[str] = []
        self.notes: Counter[str] = Counter()
        self._window: deque[tuple[int, int]] = deque()              # (records, bad records) of recent batches
        self._good = 0

    def __len__(self) -> int:
        """Returns the number of batches of one pass; without end, that is of one epoch, rounded down but at least 1."""
        whole, rest = divmod(len(self.source), self.batch_size)
        return max(1, whole) if self.repeat else whole + (rest > 0 and not self.drop_remainder)

    def batches(self, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields batch number `start`, `start + 1`, ...

        Raises:
          DataError: for a bad record with on_bad="raise", for too many with "skip".
        """
        _check(isinstance(start, (int, np.integer)) and start >= 0, "start", start, "a number, at least 0")
        import grain
        dataset = self._dataset()
        if start >= len(dataset):
            return
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=max(self.prefetch, self.threads) if self.threads else 0)
        stream = dataset[int(start):].to_iter_dataset(options)
        if self.workers:
            _mark_flags_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=max(1, self.prefetch)),
                                        worker_init_fn=_end_with_parent)
        iterator, buffers = iter(stream), Buffers()
        try:
            for batch in iterator:
                self._account(batch.pop(_REPORT))
                if self.workers:
                    # Out of shared memory, which a batch that is still held when the program ends would leak.
                    batch = {key: buffers.copy(value) for key, value in batch.items()}
                yield batch
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
            if self.workers:
                # Grain's iterators are cyclic and hold the last batches: without this their shared memory outlives the program.
                del iterator, stream, close
                gc.collect()

    def _dataset(self) -> Any:
        """Returns the Grain MapDataset whose element n is batch n."""
        import grain
        positions = grain.MapDataset.range(len(self.source)).seed(self.seed)
        if self.shuffle:
            positions = positions.shuffle()
        if self.repeat:
            positions = positions.repeat()
        batches = positions.batch(self.batch_size, drop_remainder=self.drop_remainder, batch_fn=_as_positions)
        reader = BatchReader(self.source, self.processor, self.batch_size, self.seed, self.part, self.augment, self.on_bad == "raise")
        return batches.map_with_index(reader)

    def _account(self, report: list[Any]) -> None:
        """Counts the bad records of a batch and stops the run where they are too many."""
        rows, notes, problems = report[0], report[1], report[2:]
        self.notes.update(notes)
        for reason, message in problems:
            self.bad[reason] += 1
            if self.on_bad == "raise":
                raise DataError(f'{message} (on_bad="skip" leaves such records out)')
            if len(self.bad_examples) < 20:
                self.bad_examples.append(message)
        self._good += rows - len(problems)
        self._window.append((rows, len(problems)))
        seen, bad = (sum(column) for column in zip(*self._window))
        while len(self._window) > 1 and seen - self._window[0][0] >= BUDGET_WINDOW:
            first = self._window.popleft()
            seen, bad = seen - first[0], bad - first[1]
        if self.bad_budget == 1 or not problems:
            return
        # A few bad records at the start are no share yet: what the budget allows in a whole window is allowed at once, but at most ten.
        allowed = max(self.bad_budget * seen, min(10, self.bad_budget * BUDGET_WINDOW))
        if bad > allowed or (not self._good and len(problems) == rows):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.bad.most_common(5))
            raise DataError(f"{self.source.name}: {bad} of the last {seen} records cannot be used, over bad_budget {self.bad_budget:g} ({reasons}); "
                            f"first: {self.bad_examples[0]}; mend the data or raise bad_budget.")


class BatchReader:
    """Reads and processes the records of one batch: what runs in the threads and worker processes."""

    def __init__(self, source: Source, processor: Callable[..., dict[str, np.ndarray]], batch_size: int, seed: int, part: tuple[int, int],
                 augment: bool, stop_at_bad: bool):
        self._source, self._processor, self._seed = source, processor, seed
        rows = -(-batch_size // part[1])
        self._batch_size, self._first, self._rows = batch_size, part[0] * rows, rows
        self._augment, self._stop_at_bad = augment, stop_at_bad
        self._buffers = Buffers()
        self._empty: dict[str, tuple[tuple[int, ...], np.dtype]] | None = None

    def __call__(self, number: int, positions: Int64[np.ndarray, "B"]) -> dict[str, Any]:
        """Returns batch `number`, with its report [records read, {note: number}, (reason, message) of every bad one ...] as one more entry."""
        mine = positions[self._first:self._first + self._rows]
        arrays: dict[str, np.ndarray] = {}
        weight = np.zeros(self._rows, np.float32)
        example_id = np.full(self._rows, -1, np.int64)
        example_id[:len(mine)] = mine
        report: list[Any] = [len(mine), Counter()]
        accounted = getattr(self._processor, "accounted", None)
        for row, index in enumerate(mine.tolist()):
            place = number * self._batch_size + self._first + row
            rng = np.random.default_rng((self._seed, place)) if self._augment else None
            try:
                faults.point("data.record")
                record = self._source[index]
                example, account = accounted(record, rng) if accounted is not None else (self._processor(record, rng), Account())
            except (DataError, OSError) as error:
                report.append((reason_of(error) if isinstance(error, DataError) else "file_unreadable", self._name(index, error)))
                if self._stop_at_bad:
                    break
                continue
            report[0] += account.records - 1
            report[1].update(account.notes)
            report += [(reason, self._name(index, message)) for reason, message in account.problems]
            if not arrays:
                arrays = {key: self._buffers.array((self._rows, *np.shape(value)), np.asarray(value).dtype) for key, value in example.items()}
                self._empty = {key: (value.shape[1:], value.dtype) for key, value in arrays.items()}
            self._write(arrays, row, example, index)
            weight[row] = 1
        for key, array in arrays.items():
            array[weight == 0] = _FILL.get(key, 0)
        if not arrays:
            arrays = {key: np.full((self._rows, *shape), _FILL.get(key, 0), dtype) for key, (shape, dtype) in self._shapes(report).items()}
        return {**arrays, "mask": weight > 0, "weight": weight, "example_id": example_id, _REPORT: _Report(report)}

    def _write(self, arrays: dict[str, np.ndarray], row: int, example: dict[str, np.ndarray], index: int) -> None:
        for key, array in arrays.items():
            shape = np.shape(example[key]) if key in example else None
            if shape != array.shape[1:]:
                raise ConfigError(f"processor: {key} of {self._source.describe(index)} has shape {shape}, of another record {array.shape[1:]}; "
                                  "end its operations in one that gives a fixed shape.")
            array[row] = example[key]

    def _name(self, index: int, error: Exception | str) -> str:
        item = self._source.describe(index)
        cause = str(error).removeprefix("record: ").removeprefix(f"{item}: ")
        return f"{item if f'[{index}]' in item else f'{self._source.name}[{index}] ({item})'}: {cause}"

    def _shapes(self, report: list[Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns shape and dtype of each array of an example, for a batch without a single good one."""
        if self._empty is None and hasattr(self._processor, "input_shapes"):
            dtypes = self._processor.input_dtypes()
            self._empty = {key: (tuple(shape), dtypes[key]) for key, shape in self._processor.input_shapes().items()}
        for index in range(min(_PROBES, len(self._source)) if self._empty is None else 0):
            try:
                example = self._processor(self._source[index], None)
            except (DataError, OSError):
                continue
            self._empty = {key: (np.shape(value), np.asarray(value).dtype) for key, value in example.items()}
            break
        # Without any example the batch has no arrays; the report makes the loader stop unless it was told never to.
        return self._empty or {}


class _Report(list):
    """A list that trees take for a leaf, so that it passes through Grain as it is."""

    def __reduce__(self):
        return _Report, (list(self),)


def _as_positions(values: Any) -> Int64[np.ndarray, "B"]:
    return np.asarray(values, np.int64)


def _check(right: bool, name: str, value: Any, wanted: str) -> None:
    if not right:
        raise ConfigError(f"loader.{name} is {value!r}, but it must be {wanted}.")


def _mark_flags_parsed() -> None:
    """Grain reads absl flags when it starts workers, also in notebooks and tests, where nothing has parsed any."""
    from absl import flags
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _end_with_parent(worker: int, workers: int) -> None:
    """Runs in each worker at its start: the worker ends a second after the trainer, even one that is killed.

    Not at once, as the kernel's parent-death signal would do: a block of shared memory is registered for removal after it is made, and a death in
    between leaks it.
    """
    del worker, workers
    trainer = multiprocessing.parent_process()

    def watch() -> None:
        while os.getppid() == trainer.pid:
            time.sleep(0.5)
        time.sleep(1)
        os._exit(1)
    if trainer is not None:
        threading.Thread(target=watch, name="vlm_jax trainer", daemon=True).start()
