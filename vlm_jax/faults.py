"""Faults on purpose: named points of the program where a test can kill, hang or fail it exactly.

Nothing happens unless the environment variable `VLM_JAX_FAULT` is set before the program starts; then a point costs a dictionary lookup.

    VLM_JAX_FAULT="checkpoint.before_commit:3=kill"           the third time that this process comes there, SIGKILL
    VLM_JAX_FAULT="loop.step:10@1=hang,metrics.write:2=full"  process 1 hangs at its tenth step; the second row finds the disk full

Actions: kill (SIGKILL), term (SIGTERM to itself, and on), stop (SIGSTOP), hang (sleeps for ever), fail (OSError EIO), full (OSError ENOSPC), and words that the
place itself understands (`loop.batch:5=nan`). `VLM_JAX_FAULT_TRACE=FILE` appends a line `SECONDS NAME COUNT` for every point that is passed.
"""
from collections import Counter
import errno
import os
import re
import signal
import threading
import time

from vlm_jax.errors import ConfigError, did_you_mean

# Every point that there is, and where it lies. A name outside this table is an error, in the code and in the variable.
POINTS: dict[str, str] = {
    "loop.start": "the config is read, the workdir is not yet touched",
    "loop.restored": "the newest checkpoint is restored and verified, no step is taken",
    "loop.batch": "a host batch has come; nan: its floating-point arrays become NaN; spike: they are multiplied by 1,000",
    "loop.step": "before a step is dispatched",
    "loop.log": "before a row of metrics is written",
    "loop.evaluate": "before an evaluation begins",
    "loop.end": "all steps are taken, the report is not yet written",
    "evaluation.predict": "inside an evaluation, before a batch is embedded",
    "evaluation.write": "inside an evaluation, before its files are written",
    "checkpoint.save": "before a save begins",
    "checkpoint.copied": "the arrays are copied, the loop goes on, nothing is committed",
    "checkpoint.before_commit": "all files of a step are written, the step is not yet visible",
    "checkpoint.after_commit": "the step is visible, the last-good pointer does not name it yet",
    "checkpoint.pointer": "while the last-good pointer is replaced",
    "checkpoint.collect": "before an old step is deleted",
    "checkpoint.collecting": "an old step is half deleted",
    "checkpoint.collected": "an old step is deleted",
    "checkpoint.restore": "before a step is read",
    "checkpoint.restoring": "the metadata is read, the arrays are not",
    "checkpoint.verify": "the arrays are read, their digests are not yet compared",
    "metrics.write": "while a row of metrics is appended",
    "distributed.connect": "before this process joins the others",
    "data.record": "before a record is read",
}
_SPECIFICATION = re.compile(r"([a-z_.]+):(\d+)(?:@(\d+))?=([a-z]+)")


def _read(text: str) -> dict[str, dict[int, tuple[str, int | None]]]:
    plan: dict[str, dict[int, tuple[str, int | None]]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _SPECIFICATION.fullmatch(item)
        if match is None:
            raise ConfigError(f'VLM_JAX_FAULT: "{item}" is not POINT:COUNT=ACTION or POINT:COUNT@PROCESS=ACTION; for example checkpoint.before_commit:3=kill.')
        name, count, process, action = match.groups()
        if name not in POINTS:
            raise ConfigError(f'VLM_JAX_FAULT: there is no point "{name}".{did_you_mean(name, POINTS)}')
        plan.setdefault(name, {})[int(count)] = (action, None if process is None else int(process))
    return plan


_plan = _read(os.environ.get("VLM_JAX_FAULT", ""))
_trace = os.environ.get("VLM_JAX_FAULT_TRACE")
_counts: Counter[str] = Counter()
_lock = threading.Lock()    # points lie in Orbax's and Grain's threads too


def point(name: str) -> str | None:
    """Passes the point `name`: does what `VLM_JAX_FAULT` asks for there, else nothing.

    Returns:
      an action that is the caller's to carry out (`nan`), or None.
    Raises:
      OSError: for the actions `fail` and `full`.
    """
    if not _plan and _trace is None:
        return None
    assert name in POINTS, name
    with _lock:
        _counts[name] += 1
        count = _counts[name]
        if _trace is not None:
            with open(_trace, "a", buffering=1) as file:
                file.write(f"{time.time():.6f} {name} {count}\n")
    action, process = _plan.get(name, {}).get(count, (None, None))
    if action is None or (process is not None and process != int(os.environ.get("VLM_JAX_PROCESS_ID", "0"))):
        return None
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action == "hang":
        while True:
            time.sleep(3600)
    elif action in _ERRORS:
        raise OSError(_ERRORS[action], f"{os.strerror(_ERRORS[action])} (VLM_JAX_FAULT at {name})")
    else:
        return action
    return None


_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
_ERRORS = {"fail": errno.EIO, "full": errno.ENOSPC}
