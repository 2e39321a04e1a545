"""Where a run took place: `environment.json`, and the compile cache."""
from collections.abc import Mapping, Sequence
import datetime
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import re
import stat
import subprocess
import sys
from typing import Any
import warnings

from vlm_jax import storage

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "array_record", "ml_collections",
            "sentencepiece", "numpy", "Pillow", "emoji")
# The only variables of the environment that are written down: they change what is computed and hold no secrets.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "OMP_NUM_THREADS", "GLIBC_TUNABLES")

_SECRET_NAME = re.compile(r"(token|passwd|password|secret|credential|api[_-]?key|access[_-]?key|private[_-]?key|auth(?!or))", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_\w{8,}|gh[pousr]_\w{16,}|sk-[\w-]{16,}|AKIA\w{12,}|AIza[\w-]{20,}|ya29\.[\w.-]+|eyJ[\w-]+\.[\w-]+\.[\w-]+)")
_URL_USER = re.compile(r"(\w+://)[^/\s@]+@")
_URL_QUERY = re.compile(r"([?&][^=&\s]*(?:token|sig|signature|secret|password|key|credential)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
_HIDDEN = "***"


def environment(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns versions, devices, processor, commit and command line of this process as JSON-ready values; secrets are scrubbed."""
    import jax

    import vlm_jax
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": scrub([sys.executable, *(sys.argv if argv is None else argv)]),
        "vlm_jax": vlm_jax.__version__,
        "commit": commit(Path(vlm_jax.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "variables": {name: scrub([os.environ[name]])[0] for name in VARIABLES if name in os.environ},
    }


def write_environment(workdir: str | os.PathLike, extra: Mapping[str, Any] | None = None) -> None:
    """Writes `environment.json` into the workdir: `environment()` and what `extra` adds. On a pod, process 0 writes."""
    import jax
    if jax.process_index() != 0:
        return
    text = json.dumps({**environment(), **(extra or {})}, indent=2) + "\n"
    path = os.path.join(os.fspath(workdir), "environment.json")
    storage.write_whole(path, text.encode())


def scrub(arguments: Sequence[str]) -> list[str]:
    """Returns a command line without its secrets.

    Hidden are: values of options whose name speaks of a token, password, secret or key; users in URLs and signed URL parameters; strings in
    the form of well-known tokens; and whatever an environment variable with such a name holds.
    """
    held = sorted((value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8), key=len, reverse=True)
    clean, hide_next = [], False
    for argument in map(str, arguments):
        name, equals, value = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            argument = _HIDDEN
        elif equals and value and _SECRET_NAME.search(name) and "://" not in name:
            argument = f"{name}={_HIDDEN}"
        hide_next = not equals and name.startswith("-") and bool(_SECRET_NAME.search(name))
        argument = _SECRET_VALUE.sub(_HIDDEN, _URL_QUERY.sub(rf"\1{_HIDDEN}", _URL_USER.sub(rf"\1{_HIDDEN}@", argument)))
        for secret in held:
            argument = argument.replace(secret, _HIDDEN)
        clean.append(argument)
    return clean


def commit(folder: Path) -> str | None:
    """The git commit of the checkout that `folder` is in, with `-dirty` where files differ; None outside one."""
    try:
        found = subprocess.run(["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                               capture_output=True, text=True, timeout=10)
        # A package installed into somebody else's checkout (an environment inside a project) is not at that project's commit.
        tracked = subprocess.run(["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 and tracked.returncode == 0 else None


def cpu_model() -> str:
    """The processor's name."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def use_compile_cache(folder: str | os.PathLike | None = None) -> str | None:
    """Lets JAX keep compiled programs between runs and returns the folder, or None where it is switched off or not safe.

    A compiled program is code: the folder belongs to the user alone (mode 0700), and to this kind of processor, since a program compiled for
    another one may crash. `JAX_COMPILATION_CACHE_DIR` is respected; `VLM_JAX_COMPILE_CACHE` names another folder, or `off`.
    """
    import jax
    if jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    folder = folder or os.environ.get("VLM_JAX_COMPILE_CACHE")
    if folder == "off":
        return None
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        kind = hashlib.sha256(f"{platform.machine()} {cpu_model()} {_cpu_field('flags')}".encode()).hexdigest()[:12]
        folder = os.path.join(base, "vlm_jax", f"compiled-{kind}")
    folder = os.fspath(folder)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        state = os.lstat(folder)
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
            raise PermissionError(0, "it is a link or belongs to another user")
        os.chmod(folder, 0o700)
    except OSError as error:
        warnings.warn(f"compile cache {folder} is not used: {error.strerror or error}; set VLM_JAX_COMPILE_CACHE to a folder of yours.", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", folder)
    return folder


def _cpu_field(name: str) -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.partition(":")[0].strip() == name), None)
    except OSError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
