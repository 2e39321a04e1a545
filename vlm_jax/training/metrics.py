"""What a run says about itself: `metrics.jsonl`, TensorBoard curves, and the progress line."""
from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import time
from typing import Any

from vlm_jax.errors import CheckpointError
from vlm_jax.training.append_file import AppendFile, is_remote
from vlm_jax.training.tensorboard import TensorBoardWriter

# Fields of metrics.jsonl that differ between two runs of the same seed; all others are bit-identical.
TIME_FIELDS = frozenset({"seconds", "seconds_per_step", "examples_per_second", "gflops", "mfu", "data_wait"})


class MetricWriter:
    """Writes rows of metrics into `workdir/metrics.jsonl` and curves into `workdir/tensorboard/`.

    A row is one line: {"step": 10, "kind": "train", "loss": ...} or {"step": 150, "kind": "eval", "name": ..., ...}. Numbers that are
    not finite are null. On a pod, process 0 writes.

    Args:
      workdir: a local path or gs://...
      resume_from: the step that training goes on from; rows of later steps, and a last line cut short by a kill, are dropped.
      tensorboard: False leaves the curves out.
    Raises:
      CheckpointError: if the files cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, resume_from: int = 0, tensorboard: bool = True):
        import jax
        self._file = self._curves = None
        if jax.process_index() != 0:
            return
        workdir = os.fspath(workdir)
        path = os.path.join(workdir, "metrics.jsonl")
        try:
            kept = [row for row in read_metrics(workdir) if row["step"] <= resume_from]
            self._file = AppendFile(path, keep="".join(map(_line, kept)).encode())
            if tensorboard:
                self._curves = TensorBoardWriter(os.path.join(workdir, "tensorboard"), resume_from)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); check free space and permissions, "
                                  "or choose another --workdir.") from error

    def write(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """Writes one row; numpy and JAX scalars count as numbers. `kind` is "train" or "eval"."""
        if self._file is None:
            return
        row = {name: _number(value) for name, value in row.items()}
        try:
            self._file.write(_line({"step": int(step), "kind": kind, **row}).encode())
            if self._curves is not None:
                prefix = f"{kind}/{row['name']}" if "name" in row else kind
                self._curves.scalars(step, {f"{prefix}/{name}": value for name, value in row.items() if isinstance(value, (int, float))})
        except OSError as error:
            raise CheckpointError(f"{self._file.path}: cannot be written ({error.strerror or error}); free some space and start again: "
                                  "the run goes on from its last checkpoint.") from error

    def close(self) -> None:
        """Closes the files; may be called twice."""
        for file in (self._file, self._curves):
            if file is not None:
                file.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


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


class Progress:
    """Rates of training and the line that shows them.

    The time of compiling the first step, and of what happens under `paused` (saving, evaluating), is left out of the rates but counts for
    the time that is still to come.

    Args:
      first: steps already taken.
      last: the step at which training ends.
      batch_size: examples a step.
      clock: a function returning seconds.
    """

    def __init__(self, first: int, last: int, batch_size: int, clock=time.perf_counter):
        self.first, self.last, self.batch_size = first, last, batch_size
        self._clock = clock
        self._began = self._window_began = clock()
        self._window_step = first
        self._excluded = self._waited = 0.0
        self._compile_began: float | None = None

    def compiling(self) -> None:
        """Says that the step about to be taken has to be compiled first."""
        print("compiling the training step ...", flush=True)
        self._compile_began = self._clock()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        self._end_compiling()
        began = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training."""
        self._end_compiling()
        began = self._clock()
        try:
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
