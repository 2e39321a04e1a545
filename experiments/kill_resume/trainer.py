"""Starts the training command, kills it at a moment of our choice, and says from the trace where that moment fell."""
from collections.abc import Mapping, Sequence
import dataclasses
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "experiments/kill_resume/config.py"
LIMIT = 600.0           # seconds after which a start that neither ended nor came to its moment counts as a failure of the study
LEFTOVER_LIMIT = 30.0   # seconds until nothing of a killed trainer may be left

SAVE = ("checkpoint.save", "checkpoint.copied", "checkpoint.before_commit", "checkpoint.after_commit", "checkpoint.pointer")
COLLECTION = ("checkpoint.collect", "checkpoint.collecting", "checkpoint.collected")
RESTORE = ("checkpoint.restore", "checkpoint.restoring", "checkpoint.verify")
EVALUATION = ("loop.evaluate", "evaluation.predict", "evaluation.write")


@dataclasses.dataclass(frozen=True)
class Moment:
    """When to kill: as the program passes `point` the `count`-th time, or `delay` seconds later from outside; without a point, `delay` after the start."""
    point: str | None
    count: int = 1
    delay: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the program kills itself at the point."""
        return self.delay is None

    def __str__(self) -> str:
        place = f"{self.point}:{self.count}" if self.point else "start"
        return place if self.exact else f"{place} + {1000 * self.delay:.0f} ms"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a start ended.

    Attributes:
      code: exit code; -9 after a kill.
      where: "save", "collection", "restore", "evaluation", "step", "start" or "end" where it was killed, else None.
      seconds: from the start to the end.
      leftovers: processes and shared memory that outlived it.
      output: what it printed.
    """
    code: int
    where: str | None
    seconds: float
    leftovers: list[str]
    output: str


def start(workdir: str | os.PathLike, cache: str | os.PathLike, moment: Moment | None = None, config: str = CONFIG, overrides: Sequence[str] = (),
          fault: str = "", environment: Mapping[str, str] | None = None) -> Outcome:
    """Runs `python -m vlm_jax.train` until it ends or `moment` kills it with SIGKILL.

    Args:
      cache: the folder of compiled programs that all starts share.
      fault: more for VLM_JAX_FAULT.
      environment: variables besides.
    """
    workdir = Path(workdir)
    trace = workdir.with_name(workdir.name + ".trace")
    trace.unlink(missing_ok=True)
    faults = [item for item in (f"{moment.point}:{moment.count}=kill" if moment and moment.exact else "", fault) if item]
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
                 "JAX_COMPILATION_CACHE_DIR": os.fspath(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                 "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
                 "VLM_JAX_FAULT": ",".join(faults), "VLM_JAX_FAULT_TRACE": os.fspath(trace), **(environment or {})}
    command = [sys.executable, "-m", "vlm_jax.train", "--config", config, "--workdir", os.fspath(workdir), *overrides]
    began, memory = time.monotonic(), _shared_memory()
    with open(workdir.with_name(workdir.name + ".log"), "w+") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if moment is not None and not moment.exact:
                _kill_at(child, moment, trace)
            code = child.wait(timeout=max(1.0, LIMIT - (time.monotonic() - began)))
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        log.seek(0)
        output = log.read()
    seconds = time.monotonic() - began
    where = place([line.split()[1] for line in _lines(trace)], moment.point if moment and moment.exact else None) if code == -signal.SIGKILL else None
    return Outcome(code, where, seconds, leftovers(child.pid, memory), output)


def place(passed: Sequence[str], killed_at: str | None = None) -> str:
    """Where in a run the moment after the points `passed` falls; `killed_at` is the point that killed, if one did.

    A save may be under way while the loop goes on, so saves and collections are looked at apart from the loop.
    """
    for name, family in (("save", SAVE), ("collection", COLLECTION), ("restore", RESTORE), ("evaluation", EVALUATION)):
        if killed_at in family:
            return name
    last_of = {family: next((name for name in reversed(passed) if name in family), None) for family in (SAVE, COLLECTION)}
    if "loop.start" not in passed:
        return "start"
    if last_of[COLLECTION] in COLLECTION[:2]:
        return "collection"
    if last_of[SAVE] in SAVE[:-1]:
        return "save"
    loop = next(name for name in reversed(passed) if name.startswith(("loop.", "evaluation.")) or name in RESTORE)
    if loop in RESTORE:
        return "restore"
    if loop in EVALUATION:
        return "evaluation"
    return {"loop.start": "start", "loop.end": "end"}.get(loop, "step")


def leftovers(session: int, memory: set[str]) -> list[str]:
    """Processes of the killed trainer's session and shared memory that was not in `memory` before it, once both had time to go away.

    Other programs on the machine have shared memory as well, but theirs is mapped, or comes and goes.
    """
    deadline = time.monotonic() + LEFTOVER_LIMIT
    left = _shared_memory() - memory
    while (found := _processes(session) + sorted(left)) and time.monotonic() < deadline:
        time.sleep(0.1)
        left &= _unmapped(_shared_memory())
    return found


def _kill_at(child: subprocess.Popen, moment: Moment, trace: Path) -> None:
    """Waits until the trace shows the moment's point, then `delay` seconds, and kills."""
    wanted = f" {moment.point} {moment.count}"
    while moment.point and child.poll() is None and not any(line.endswith(wanted) for line in _lines(trace)):
        time.sleep(0.002)
    try:
        child.wait(timeout=moment.delay)
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGKILL)      # the trainer alone: its workers have to notice by themselves


def _lines(trace: Path) -> list[str]:
    return [line for line in trace.read_text().splitlines() if line.count(" ") == 2] if trace.exists() else []


def _processes(session: int) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(rest[2]) == session and state != "Z":
                found.append(f"process {entry.name}: {(entry / 'cmdline').read_text().replace(chr(0), ' ')[:100]}")
        except (OSError, ValueError):
            continue
    return found


def _shared_memory() -> set[str]:
    """Names of Python's shared memory on this machine."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("psm_*")} if folder.exists() else set()


def _unmapped(names: set[str]) -> set[str]:
    """Those that no living process has mapped."""
    for entry in Path("/proc").glob("[0-9]*/maps") if names else ():
        try:
            text = entry.read_text()
        except OSError:
            continue
        names = {name for name in names if name not in text}
    return names
