"""Several processes of one run: start-up that says what it waits for, agreement, one step at which all stop, the end of a peer in one line.

    distributed.start()                        # before anything else of JAX; arguments, environment, TPU VMs, SLURM, or one process
    with distributed.guarded():                # a peer that dies, hangs or fails ends this process with one line and exit code 76
        distributed.check_same("config", config)
        ...
        if distributed.stops_at(step): ...     # true on all processes at the same step, after request_stop() on any

With one process all of it is there and does nothing. The agreements are lines over the connections of `peers.py`: no device takes part in them.
"""
from collections.abc import Iterator
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from typing import Any

from vlm_jax import __version__, faults
from vlm_jax.errors import ConfigError, PeerError, VlmError
from vlm_jax.peers import PeerEnded, Peers

TIMEOUT, HEARTBEAT = 300.0, 100.0       # seconds
_GRACE_SECONDS = 1.0        # an error that all processes meet is each one's own to print
_JAX_SLACK_SECONDS = 60     # JAX's own heartbeat ends a process by SIGABRT: ours comes first
_LOOPBACK = ("127.", "localhost", "::1", "[::1]")

_peers: Peers | None = None
_stop_requested = False


def start(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None, timeout: float | None = None,
          heartbeat: float | None = None, bind: str | None = None) -> int:
    """Joins the other processes of the run; returns the number of processes. To be called before anything else of JAX.

    What is not given comes from the environment, VLM_JAX_COORDINATOR, VLM_JAX_PROCESSES, VLM_JAX_PROCESS_ID, VLM_JAX_TIMEOUT, VLM_JAX_HEARTBEAT and
    VLM_JAX_BIND; else from what TPU VMs and SLURM say; else there is one process and nothing is done.

    Args:
      coordinator: HOST:PORT of process 0, as the others reach it.
      processes, process_id: how many there are, and which one this is, from 0.
      timeout: seconds to wait for the others, by default 300; a line every ten seconds says for whom.
      heartbeat: seconds without a sign of life after which a process counts as lost, by default 100.
      bind: the address that process 0 listens on, by default the coordinator's: on loopback nobody else can connect.
    Raises:
      ConfigError: arguments that cannot work, a port in use, processes that do not belong together (versions, numbers, devices).
      PeerError: not all came in time.
    """
    global _peers
    if _peers is not None:
        raise ConfigError("vlm_jax.distributed.start was called twice; call it once, before anything else.")
    coordinator, processes, process_id = _who(coordinator, processes, process_id)
    timeout = _number("VLM_JAX_TIMEOUT", timeout, TIMEOUT)
    heartbeat = _number("VLM_JAX_HEARTBEAT", heartbeat, HEARTBEAT)
    if processes == 1:
        return 1
    host, port = _address(coordinator)
    os.environ["VLM_JAX_PROCESS_ID"] = str(process_id)      # vlm_jax.faults reads it
    faults.point("distributed.connect")
    bind = bind or os.environ.get("VLM_JAX_BIND") or (host if not host.startswith(_LOOPBACK) else "127.0.0.1" if ":" not in host else "::1")

    import jax
    facts = {"vlm_jax": __version__, "jax": jax.__version__, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "")}
    peers = Peers(process_id, processes, (host, port), bind=bind, facts=facts, timeout=timeout, heartbeat=heartbeat, on_end=_ended, say=_say)
    peers.join()
    _peers = peers
    _let_peers_speak_before_abort()
    if process_id == 0:
        _say(f"all {processes} processes have come to {coordinator}")
    if host.startswith(_LOOPBACK):
        _gloo_listens_on(host)
    try:
        # Its handler would swallow SIGTERM from here on; `request_stop` and `stops_at` agree on a step without it.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(f"{_bracket(host)}:{port}", processes, process_id, local_device_ids=_local_devices(), cluster_detection_method="deactivate",
                                   initialization_timeout=max(60, int(timeout)), coordinator_bind_address=f"{_bracket(bind)}:{port}",
                                   heartbeat_timeout_seconds=int(heartbeat) + _JAX_SLACK_SECONDS)
        if jax.default_backend() == "cpu":
            _silence_gloo()
        check_same("devices", {"platform": jax.default_backend(), "devices of a process": jax.local_device_count()})
    except Exception as error:
        wrapped = error if isinstance(error, VlmError) else ConfigError(
            f"coordinator {coordinator}: JAX did not start with {processes} processes ({_first_line(error)}); choose another port, or correct the devices.")
        _leave(wrapped.exit_code, str(wrapped))
        raise wrapped from error
    return processes


def process_id() -> int:
    """Which process this is, from 0."""
    return _peers.process if _peers is not None else 0


def agree(value: Any, what: str = "agree") -> Any:
    """Returns the value of process 0, which must be something JSON can hold; all processes must call it. Raises a PeerError as `Peers.exchange` does."""
    return _exchange(what, value)[0]


def any_process(flag: bool, what: str = "any_process") -> bool:
    """Returns whether `flag` is true on any process; all processes must call it."""
    return any(_exchange(what, bool(flag)))


def barrier(name: str, timeout: float | None = None) -> None:
    """Returns once all processes have come to the barrier `name`; raises a PeerError after `timeout` seconds, or when their barriers differ."""
    _exchange(f"barrier {name}", None, timeout)


def check_same(name: str, value: Any) -> None:
    """Raises a ConfigError on all processes, naming the first difference, unless `value` (anything JSON can hold) is the same on all.

    The processes exchange digests; the values only where these differ.
    """
    text = json.dumps(value, sort_keys=True)
    given = _exchange(f"check_same {name}", hashlib.sha256(text.encode()).hexdigest())
    other = next((process for process, digest in enumerate(given) if digest != given[0]), None)
    if other is None:
        return
    values = _exchange(f"difference of {name}", json.loads(text) if process_id() in (0, other) else None)
    where, ours, theirs = _difference(name, values[0], values[other])
    raise ConfigError(f"{where} is {_short(theirs)} in process {other}, {_short(ours)} in process 0; start all with the same command and the same files.")


def _difference(where: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """The path of the first place where two JSON values differ, with what they hold there."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in sorted(a.keys() | b.keys()) if a.get(key, ...) != b.get(key, ...))
        return _difference(f"{where}.{key}", a.get(key, "missing"), b.get(key, "missing"))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        place = next(place for place in range(len(a)) if a[place] != b[place])
        return _difference(f"{where}.{place}", a[place], b[place])
    return where, a, b


def request_stop() -> None:
    """Asks that all processes stop at the same step; safe in a signal handler."""
    global _stop_requested
    _stop_requested = True
    if _peers is not None:
        _peers.request_stop()


def stops_at(step: int) -> bool:
    """Whether the run stops at `step` since some process was asked to: the same answer on all processes at the same step, without a collective.

    To be asked once a step, in ascending order. It costs a lock, and a pause of some milliseconds once a stop has been requested.
    """
    return _peers.stops_at(step) if _peers is not None else _stop_requested


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What one process of several runs: errors leave in one line each, and no process waits for one that is gone.

    With several processes, the end of the block waits for all and says goodbye; an error is printed here and leaves by `os._exit` with its exit code (JAX
    would wait for the others, then abort); an error that another process's end caused is that process's: one line, exit code 76. With one process, and where
    `start` was not called inside, nothing is done.
    """
    try:
        yield
        if _peers is not None:
            finish()
    except BaseException as error:
        if _peers is None:
            raise
        # The loss of a peer shows first as a failed collective; who was lost is known a moment later.
        caused = not isinstance(error, (VlmError, KeyboardInterrupt, SystemExit)) or isinstance(error, PeerError)
        if caused and _peers.failure(wait=3.0) is not None:
            time.sleep(2 * _GRACE_SECONDS + 5)      # `_ended` is on its way
        if isinstance(error, VlmError):
            code, line = error.exit_code, str(error)
            print(f"error: {line}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            code, line = 130, "stopped by the keyboard"
            print(f"{line}; the same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
        elif isinstance(error, SystemExit):
            code, line = error.code if isinstance(error.code, int) else int(error.code is not None), "it left by sys.exit"
        else:
            code, line = 1, f"{type(error).__name__}: {_first_line(error)}"
            traceback.print_exc()
        if code == 75:
            with contextlib.suppress(Exception):
                finish(75)
        else:
            _leave(code, line)
        _exit(code)


def finish(code: int = 0) -> None:
    """Waits until all processes have come to the end, says goodbye and leaves JAX's coordination service."""
    global _peers
    if _peers is None:
        return
    import jax
    _peers.exchange("the end", None)
    jax.distributed.shutdown()
    _leave(code, "")
    _peers = None


def resume_command() -> str:
    """The command that starts the run again, of all processes where a launcher has started them."""
    return os.environ.get("VLM_JAX_COMMAND") or " ".join(shlex.join(["python", *sys.orig_argv[1:]]).split())


def _who(coordinator: str | None, processes: int | None, process: int | None) -> tuple[str | None, int, int]:
    """Returns (coordinator, processes, process): the arguments, else the environment, else what the cluster says, else one process."""
    where = "--coordinator, --processes and --process_id"
    if coordinator is None and processes is None and process is None:
        where = "VLM_JAX_COORDINATOR, VLM_JAX_PROCESSES and VLM_JAX_PROCESS_ID"
        coordinator = os.environ.get("VLM_JAX_COORDINATOR")
        processes = _whole("VLM_JAX_PROCESSES", os.environ.get("VLM_JAX_PROCESSES"))
        if coordinator is not None or processes is not None:
            process = _whole("VLM_JAX_PROCESS_ID", os.environ.get("VLM_JAX_PROCESS_ID"))
    if coordinator is None and processes is None and process is None:
        coordinator, processes, process = _cluster()
    if processes == 1 and process in (None, 0):
        return coordinator, 1, 0
    missing = [name for name, value in zip(where.replace(" and", ",").split(", "), (coordinator, processes, process)) if value is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: several processes need {where}, each process the same but for its id.")
    if processes < 1 or not 0 <= process < processes:
        raise ConfigError(f"process id {process} of {processes} processes: ids go from 0 to {max(0, processes - 1)}; correct {where}.")
    return coordinator, processes, process


def _cluster() -> tuple[str | None, int, int]:
    """What a TPU VM or SLURM says about this process, as JAX reads it: (coordinator, processes, process)."""
    slurm = all(name in os.environ for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"))
    if slurm and _whole("SLURM_NTASKS", os.environ["SLURM_NTASKS"]) == 1:
        return None, 1, 0
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
        if not (slurm or running_in_cloud_tpu_vm or "TPU_WORKER_HOSTNAMES" in os.environ):
            return None, 1, 0
        if not slurm and os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
            return None, 1, 0       # a TPU VM whose TPU is not used
        from jax._src.clusters import ClusterEnv
        for kind in ClusterEnv._cluster_types:
            if kind.name in (("slurm",) if slurm else ("gcetpu", "gketpu")) and kind.is_env_present():
                processes = kind.get_process_count()
                if processes == 1:
                    return None, 1, 0
                port = os.environ.get("JAX_COORDINATOR_PORT")
                return kind.get_coordinator_address(timeout_secs=60, override_coordinator_port=port), processes, kind.get_process_id()
    except Exception as error:
        raise ConfigError(f"the processes of this {'SLURM job' if slurm else 'TPU'} cannot be told from its environment ({_first_line(error)}); give "
                          "--coordinator, --processes and --process_id.") from error
    return None, 1, 0


def _local_devices() -> list[int] | None:
    """The GPUs of this process: one each where SLURM runs several processes on a node and shows all GPUs to all of them; None is all that it sees."""
    if "SLURM_LOCALID" not in os.environ or "SLURM_STEP_NODELIST" not in os.environ or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", "1"))
    alone = all(part.split("(")[0] == "1" for part in tasks.split(","))
    return [int(os.environ["SLURM_LOCALID"])] if not alone and len(visible) > 1 else None


def _address(coordinator: str) -> tuple[str, int]:
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"coordinator {coordinator}: write HOST:PORT with a port from 1 to 65535, for example 127.0.0.1:1234.")
    return host.strip("[]"), int(port)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _whole(name: str, value: str | None) -> int | None:
    if value is not None and not value.isdecimal():
        raise ConfigError(f"{name} is {value}; it must be a whole number.")
    return None if value is None else int(value)


def _number(name: str, value: float | None, default: float) -> float:
    text = os.environ.get(name)
    try:
        seconds = float(value if value is not None else default if text is None else text)
    except ValueError:
        raise ConfigError(f"{name} is {text}; it must be a number of seconds.") from None
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{name.removeprefix('VLM_JAX_').lower()} is {seconds:g} seconds; it must be more than 0 and less than a million.")
    return seconds


def _exchange(what: str, value: Any, timeout: float | None = None) -> list[Any]:
    if _peers is not None:
        return _peers.exchange(what, value, timeout)
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        raise ConfigError("several processes were started by jax.distributed.initialize; call vlm_jax.distributed.start instead of it.")
    return [value]


def _say(line: str) -> None:
    print(line, flush=True)


def _ended(error: PeerEnded) -> None:
    """The end of this process, in a thread, when another one has ended: one line, no waiting for anything."""
    resume = f"; all processes stop. Start all of them again to go on from the last checkpoint: {resume_command()}"
    if error.by_error:
        resume = ""
        time.sleep(_GRACE_SECONDS)
    if sys.stdout is not None:
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)     # the main thread may hold its lock for ever
        flush.start()
        flush.join(0.5)
    os.write(2, f"error: {error}{resume}\n".encode())
    _exit(error.exit_code, flush=False)


def _leave(code: int, line: str) -> None:
    if _peers is not None:
        _peers.leave(code, line)
        _peers.close()


def _exit(code: int, flush: bool = True) -> None:
    """Ends the process at once, its children too: at an ordinary end JAX would wait for the others, and abort."""
    for child in multiprocessing.active_children():
        child.kill()
    if flush:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
    os._exit(code)


def _gloo_listens_on(host: str) -> None:
    """Collectives between CPU devices of several processes listen where the machine's name leads, on loopback only if told so; JAX has no setting for it."""
    from jax._src.lib import _jax
    make = getattr(_jax, "make_gloo_tcp_collectives", None)
    if make is not None:
        _jax.make_gloo_tcp_collectives = functools.partial(make, hostname=host)


def _silence_gloo() -> None:
    """Collectives between CPU devices print a line for every pair of devices, from C++: Python's output gets a descriptor of its own, theirs ends nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):     # in a notebook there is no descriptor
        if sys.stdout.fileno() == 1:
            sys.stdout.flush()
            sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)


def _let_peers_speak_before_abort() -> None:
    """Where process 0 dies, JAX's client aborts this process within milliseconds; its thread is held up until ours has said who died."""
    import ctypes
    global _abort_handler
    library = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)

    def wait(number: int) -> None:
        time.sleep(5.0)
        library.signal(number, None)        # nobody died: abort() goes on

    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    _abort_handler = kind(wait)
    library.signal(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


_abort_handler = None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
