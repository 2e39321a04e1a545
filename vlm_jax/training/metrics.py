"""What a run says about itself: `metrics.jsonl`, TensorBoard curves, and the progress line."""
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
import os
import time
from typing import Any

from vlm_jax import faults
from vlm_jax.errors import CheckpointError
from vlm_jax.storage import is_remote
from vlm_jax.training.append_file import AppendFile
from vlm_jax.training.tensorboard import TensorBoardWriter

# Fields of metrics.jsonl that differ between two runs of the same seed; all others are bit-identical.
TIME_FIELDS = frozenset({"seconds", "seconds_per_step", "examples_per_second", "gflops", "mfu", "data_wait", "goodput"})
HELD_ROWS = 10_000   # rows that wait in memory for a disk that is full, before the run stops


class MetricWriter:
    """Writes rows of metrics into `workdir/metrics.jsonl` and curves into `workdir/tensorboard/`, each exactly once over all starts of a run.

    A row is one line: {"step": 10, "kind": "train", "loss": ...} or {"step": 150, "kind": "eval", "name": ..., ...}. Numbers that are
    not finite are null. On a pod, process 0 writes.

    A disk that is full does not end the training: the rows wait in memory, with a warning, and are written before the next one. Only where they still cannot
    be written at the end, or more than `HELD_ROWS` wait, a CheckpointError does. Curves that cannot be written are left out.

    Args:
      workdir: a local path or gs://...
      resume_from: the step that training goes on from; rows of later steps, and a last line cut short by a kill, are dropped.
      tensorboard: False leaves the curves out.
    Attributes:
      kept: the rows of before, up to `resume_from`.
      dropped: those of later steps, which are taken again.
    Raises:
      CheckpointError: if the files cannot be written when the run starts.
    """

    def __init__(self, workdir: str | os.PathLike, resume_from: int = 0, tensorboard: bool = True):
        import jax
        self._file = self._curves = None
        self._waiting: list[bytes] = []
        workdir = os.fspath(workdir)
        path = os.path.join(workdir, "metrics.jsonl")
        rows = read_metrics(workdir) if jax.process_index() == 0 else []
        self.kept = [row for row in rows if row["step"] <= resume_from]
        self.dropped = [row for row in rows if row["step"] > resume_from]
        if jax.process_index() != 0:
            return
        try:
            self._file = AppendFile(path, keep="".join(map(_line, self.kept)).encode())
            if tensorboard:
                # The curves follow the rows: a kill may have fallen between the last row and its curves, so that step is written again.
                self._curves = TensorBoardWriter(os.path.join(workdir, "tensorboard"), resume_from - 1)
                for row in self.kept:
                    if row["step"] == resume_from:
                        self._draw(row)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); check free space and permissions, "
                                  "or choose another --workdir.") from error

    def write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """Writes one row; numpy and JAX scalars count as numbers. `kind` is "train" or "eval"."""
        if self._file is None:
            return
        row = {"step": int(step), "kind": kind, **{name: _number(value) for name, value in row.items()}}
        self._waiting.append(_line(row).encode())
        try:
            faults.point("metrics.write")
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) == 1:
                print(f"warning: {self._file.path} cannot be written ({error.strerror or error}); training goes on, rows wait in memory. Free some space.",
                      flush=True)
            if len(self._waiting) > HELD_ROWS:
                raise self._lost(error) from error
        if self._curves is not None:
            try:
                self._draw(row)
            except OSError:     # the rows hold the same numbers
                pass

    def flush(self) -> None:
        """Makes sure that the rows so far outlive a kill; called before a checkpoint that relies on them."""
        for file in (self._file, self._curves):
            try:
                if file is not None:
                    file.flush()
            except OSError as error:
                print(f"warning: metrics cannot be written ({error.strerror or error}); training goes on.", flush=True)

    def close(self) -> None:
        """Closes the files; may be called twice. Raises a CheckpointError for rows that could not be written."""
        if self._file is None:
            return
        try:
            self._write_waiting()
            for file in (self._file, self._curves):
                if file is not None:
                    file.close()
        except OSError as error:
            raise self._lost(error) from error

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            self._file.write(self._waiting[0])
            del self._waiting[0]

    def _draw(self, row: Mapping[str, Any]) -> None:
        prefix = f"{row['kind']}/{row['name']}" if "name" in row else row["kind"]
        self._curves.scalars(row["step"], {f"{prefix}/{name}": value for name, value in row.items()
                                           if name not in ("step", "kind") and isinstance(value, (int, float))})

    def _lost(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._file.path}: {len(self._waiting)} rows cannot be written ({error.strerror or error}); free some space and start again: "
                               "the run goes on from its last checkpoint.")


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of `workdir/metrics.jsonl`, oldest first; lines that are not rows (cut short by a kill) are left out."""
    path = os.path.join(os.fspath(workdir), "metrics.jsonl")
    if is_remote(path):
        from etils import epath
        text = epath.Path(path).read_text() if epath.Path(path).exists() else ""
    else:
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Goodput:
    """Where the time of a run goes, in seconds, over all its starts:

        start      reading config and data, restoring, until the first step
        compile    the first step, which is compiled first
        steps      training, the only time that counts
        data       waiting for batches
        save       saving, as far as the loop waits for it
        evaluate   evaluations
        lost       what earlier starts logged after the checkpoint that the next one went on from: these steps are taken again

    The time between two starts, and what a killed start did after its last row, are not known here.

    Args:
      kept, dropped: the rows of before, as `MetricWriter` has them.
      began: when this start began, on `clock`.
    """
    KINDS = ("start", "compile", "steps", "data", "save", "evaluate", "lost")

    def __init__(self, kept: Sequence[Mapping[str, Any]] = (), dropped: Sequence[Mapping[str, Any]] = (), began: float | None = None, clock=time.perf_counter):
        self._clock, self._kind = clock, "start"
        self._since = clock() if began is None else began
        logged = [[row["goodput"] for row in rows if isinstance(row.get("goodput"), Mapping)] for rows in (kept, dropped)]
        self._seconds = dict.fromkeys(self.KINDS, 0.0)
        self._seconds.update(logged[0][-1] if logged[0] else {})
        if logged[1]:
            self._seconds["lost"] += max(0.0, sum(logged[1][-1].values()) - sum(self._seconds.values()))

    def enter(self, kind: str) -> str:
        """Books the time from now on as `kind`; returns what it was booked as before."""
        now, before = self._clock(), self._kind
        self._seconds[before] += now - self._since
        self._since, self._kind = now, kind
        return before

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Books the time spent inside as `kind`."""
        before = self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds so far, rounded to milliseconds."""
        self.enter(self._kind)
        return {kind: round(value, 3) for kind, value in self._seconds.items()}

    def line(self) -> str:
        """`goodput: steps 91 % of 2:03:21  start 1 %  compile 1 %  data 2 %  save 1 %  evaluate 4 %`."""
        seconds = self.seconds()
        total = sum(seconds.values()) or 1.0
        shares = [f"{kind} {100 * seconds[kind] / total:.0f} %" for kind in self.KINDS if kind != "steps" and seconds[kind] / total >= 0.005]
        return "  ".join([f"goodput: steps {100 * seconds['steps'] / total:.0f} % of {duration(total)}", *shares])


class Progress:
    """Rates of training and the line that shows them.

    The time of compiling the first step, and of what happens under `paused` (saving, evaluating), is left out of the rates but counts for
    the time that is still to come.

    Args:
      first: steps already taken.
      last: the step at which training ends.
      batch_size: examples a step.
      clock: a function returning seconds.
      goodput: where the same times are booked.
    """

    def __init__(self, first: int, last: int, batch_size: int, clock=time.perf_counter, goodput: Goodput | None = None):
        self.first, self.last, self.batch_size = first, last, batch_size
        self._goodput = goodput or Goodput(clock=clock)
        self._clock = clock
        self._began = self._window_began = clock()
        self._window_step = first
        self._excluded = self._waited = 0.0
        self._compile_began: float | None = None

    def compiling(self) -> None:
        """Says that the step about to be taken has to be compiled first."""
        print("compiling the training step ...", flush=True)
        self._compile_began = self._clock()
        self._goodput.enter("compile")

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        self._end_compiling()
        began = self._clock()
        try:
            with self._goodput.during("data"):
                yield
        finally:
            self._waited += self._clock() - began

    @contextlib.contextmanager
    def paused(self, kind: str = "save") -> Iterator[None]:
        """Time spent inside is not training, but "save" or "evaluate"."""
        self._end_compiling()
        began = self._clock()
        try:
            with self._goodput.during(kind):
                yield
        finally:
            self._excluded += self._clock() - began

    def rates(self, step: int, step_flops: float | None = None, peak: float | None = None, num_devices: int = 1) -> dict[str, float]:
        """Rates since the last call, as fields for the metrics; none where nothing but the compiling step was taken.

        Args:
          step: steps taken by now; the caller has waited for the last one.
          step_flops: floating-point operations of one step over all devices.
          peak: FLOP/s of one accelerator, or of the whole machine where the devices are its CPU cores.
          num_devices: devices of the mesh.
        Returns:
          seconds_per_step, examples_per_second, data_wait (fraction of the time), gflops (achieved, all devices), mfu (fraction of the peak).
        """
        now = self._clock()
        compiled_only = self._compile_began is not None      # the first step was not told apart from its compilation
        if compiled_only:
            self._end_compiling()
        seconds = now - self._window_began - self._excluded
        steps, waited = step - self._window_step, self._waited
        self._window_began, self._window_step, self._excluded, self._waited = now, step, 0.0, 0.0
        if compiled_only or steps <= 0 or seconds <= 0:
            return {}
        rates = {"seconds_per_step": seconds / steps, "examples_per_second": steps * self.batch_size / seconds,
                 "data_wait": min(1.0, waited / seconds)}
        if step_flops:
            achieved = steps * step_flops / seconds
            rates["gflops"] = achieved / 1e9
            if peak:
                rates["mfu"] = achieved / (peak * _independent(num_devices))
        return rates

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        """`step 120/450  loss 3.2145  lr 9.8e-04  512 examples/s  MFU 61 %  45 GFLOP/s  data wait 2 %  ETA 3:21`."""
        parts = [f"step {step}/{self.last}"]
        if row.get("loss") is not None:
            parts.append(f"loss {row['loss']:.4f}")
        rate = row.get("learning_rate", row.get("lr"))
        if rate is not None:
            parts.append(f"lr {rate:.2e}")
        if "examples_per_second" in row:
            parts.append(f"{row['examples_per_second']:.4g} examples/s")
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.0%}".replace("%", " %"))
        if "gflops" in row:
            parts.append(f"{row['gflops']:.4g} GFLOP/s")
        if "data_wait" in row:
            parts.append(f"data wait {row['data_wait']:.0%}".replace("%", " %"))
        if step > self.first:
            parts.append(f"ETA {duration((self._clock() - self._began) / (step - self.first) * (self.last - step))}")
        return "  ".join(parts)

    def _end_compiling(self) -> None:
        if self._compile_began is None:
            return
        seconds = self._clock() - self._compile_began
        self._compile_began = None
        self._goodput.enter("steps")
        self._excluded += seconds
        self._began += seconds      # compiling happens once: it says nothing about the time to come
        print(f"compiled in {seconds:.1f} s", flush=True)


def duration(seconds: float) -> str:
    """`3:21`, `2:03:21`, `4 d 02:03`."""
    seconds = int(round(seconds))
    days, hours, minutes = seconds // 86400, seconds % 86400 // 3600, seconds % 3600 // 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}"
    return f"{minutes}:{seconds % 60:02d}"


def _independent(num_devices: int) -> int:
    """Simulated CPU devices share the machine; accelerators add up."""
    import jax
    return 1 if jax.default_backend() == "cpu" else num_devices


def _number(value: Any) -> Any:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _number(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_number(item) for item in value]
    value = value.item() if hasattr(value, "item") else float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
