"""One trainer a workdir: two would delete each other's unfinished checkpoints."""
import json
import os
import socket
import threading
import time
from typing import Any

from vlm_jax.errors import CheckpointError
from vlm_jax.training.append_file import is_remote

NAME = "train.lock"
_STARTED = time.strftime("%Y-%m-%d %H:%M:%S %Z")
_BEAT_SECONDS, _STALE_SECONDS = 30.0, 300.0


class WorkdirLock:
    """Holds `workdir/train.lock` (host, process, start time) for as long as the `with` block runs.

    On a local disk the kernel holds the lock and drops it with the process, so a killed trainer never blocks the next one. Object stores
    have no locks: there the file is renewed every half minute and one that has not been renewed for five minutes counts as abandoned,
    as does one whose process on this host is gone. On a pod, process 0 holds the lock for all.

    Raises:
      CheckpointError: on entering, if another trainer holds the workdir or the workdir cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.path = os.path.join(os.fspath(workdir), NAME)
        self._descriptor: int | None = None
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> "WorkdirLock":
        import jax
        if jax.process_index() != 0:
            return self
        try:
            if is_remote(self.path):
                self._enter_remote()
            else:
                self._enter_local()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror or error}); choose another --workdir or mend its "
                                  "permissions.") from error
        return self

    def __exit__(self, *_) -> None:
        if self._beat is not None:
            self._stop.set()
            self._beat.join()
            self._beat = None
            _remote(self.path).unlink(missing_ok=True)
        if self._descriptor is not None:
            if _same_file(self._descriptor, self.path):
                os.unlink(self.path)
            os.close(self._descriptor)
            self._descriptor = None

    def _enter_local(self) -> None:
        import fcntl
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _parse(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                if not _gone(holder):
                    raise self._refusal(holder) from None
                os.unlink(self.path)        # a child of the dead trainer still has the file open
                continue
            except BaseException:
                os.close(descriptor)
                raise
            # The holder before may have unlinked the file between open and flock: then this lock is on a file nobody sees.
            if _same_file(descriptor, self.path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def _enter_remote(self) -> None:
        path = _remote(self.path)
        if path.exists():
            holder = _parse(path.read_bytes())
            if not _gone(holder) and time.time() - holder.get("renewed", 0) < _STALE_SECONDS:
                raise self._refusal(holder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_me()))
        self._beat = threading.Thread(target=self._renew, daemon=True)
        self._beat.start()

    def _renew(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            _remote(self.path).write_text(json.dumps(_me()))

    def _refusal(self, holder: dict[str, Any]) -> CheckpointError:
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"
        return CheckpointError(f"{os.path.dirname(self.path)}: {who} has been training here since {holder.get('started', 'a while')}; "
                               "stop it, or choose another --workdir.")


def _same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "process_start": _process_start(os.getpid()),
            "started": _STARTED, "renewed": time.time()}


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder ran on this host and has ended (its number may belong to another process by now)."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _process_start(holder["pid"]) != holder.get("process_start")


def _process_start(pid: int) -> str | None:
    """When the kernel started the process, in ticks since boot; None where /proc does not say."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _parse(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _remote(path: str):
    from etils import epath
    return epath.Path(path)
