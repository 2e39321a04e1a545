"""The one writer of `results.json`: what was measured, by which command, where and when."""
import datetime
import json
import math
import os
from pathlib import Path
import platform
import shlex
import sys
import time
from typing import Any

import numpy as np

SIGNIFICANT_DIGITS = 4
_EXACT = 2**53   # above it a float cannot count


def write_results(folder: str | os.PathLike, metrics: dict[str, float], seeds: tuple[int, ...] = (0,), **details: Any) -> Path:
    """Writes `folder/results.json` and returns its path.

    Args:
      folder: the folder of the study; the study is named after it unless `details` holds `name`.
      metrics: {name: number}, the figures that the study is for; what `rounded` makes of them is written.
      seeds: the random seeds that the figures come from.
      details: anything JSON can hold besides (tables, settings); numpy scalars and arrays are converted. `hardware` adds to the
        machine's description, `command` replaces the command line of this process.
    Raises:
      ValueError: for a metric that is not a finite number.
    """
    folder = Path(folder)
    for key, value in metrics.items():
        if not math.isfinite(float(value)):
            raise ValueError(f"metric {key} of {folder.name} is {value}, which is not a number to record.")
    name = details.pop("name", folder.resolve().name)
    command = details.pop("command", None) or command_line()
    results = {"name": name, "command": command, "hardware": {**hardware(), **details.pop("hardware", {})}, "date": datetime.date.today().isoformat(),
               "seeds": list(seeds), "metrics": rounded(dict(metrics)), "details": rounded(details)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def command_line() -> str:
    """Returns the command of this process as a reader would type it: `python -m module arguments`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        module = spec.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", module, *sys.argv[1:]])
    return shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])


def hardware() -> dict[str, Any]:
    """Returns {cpu, cores, python, jax, devices}; jax and devices only if jax is loaded, since naming devices starts a backend."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": cpu_model(), "cores": cores, "python": platform.python_version()}
    if "jax" in sys.modules:
        import jax
        found["jax"] = jax.__version__
        found["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return found


def cpu_model() -> str:
    """Returns the processor's name as the kernel gives it, or the architecture where it gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def matmul_gflops(size: int = 2048, repeats: int = 5) -> float:
    """Returns the best GF/s of a float32 [size, size] matrix product in jax on this machine: the ceiling that step times are read against."""
    import jax
    import jax.numpy as jnp
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    product(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def rounded(value: Any) -> Any:
    """Returns `value` as JSON can hold it: whole numbers exactly, whatever their type (they count something), other floats to four significant digits."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (float, np.floating)):
        value = float(value)
        if not math.isfinite(value):
            return None
        return value if value.is_integer() and abs(value) < _EXACT else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return value
