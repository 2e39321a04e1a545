"""One trainer a workdir: two would delete each other's unfinished checkpoints."""
import json
import logging
import os
import socket
import time
from typing import Any

from vlm_jax.errors import CheckpointError
from vlm_jax.storage import is_remote
from vlm_jax.training.remote_lock import RemoteLock

NAME = "train.lock"
_log = logging.getLogger(__name__)
_STARTED = time.strftime("%Y-%m-%d %H:%M:%S %Z")


class WorkdirLock:
    """Holds `workdir/train.lock` (host, process, start time) for as long as the `with` block runs.

    On a local disk the kernel holds the lock and drops it with the process, so a killed trainer never blocks the next one. Object stores
    have no locks: there it is a file that its owner renews (`remote_lock.py`); after a kill on another machine the next trainer waits two
    minutes for a sign of life before it takes over. On a pod, process 0 holds the lock for all.

    Raises:
      CheckpointError: on entering, if another trainer holds the workdir or the workdir cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.path = os.path.join(os.fspath(workdir), NAME)
        self._descriptor: int | None = None
        self._remote: RemoteLock | None = None

    def __enter__(self) -> "WorkdirLock":
        import jax
        if jax.process_index() != 0:
            return self
        try:
            if is_remote(self.path):
                self._remote = RemoteLock(self.path, _me(), _gone, self._refusal)
                self._remote.acquire()
            else:
                self._enter_local()
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror or error}); choose another --workdir or mend its "
                                  "permissions.") from error
        return self

    def __exit__(self, *_) -> None:
        if self._remote is not None:
            try:
                self._remote.release()
            except OSError as error:
                _log.warning("WARNING: %s could not be released (%s); the next trainer waits until it is stale.", self.path, error)
            self._remote = None
        if self._descriptor is not None:
            if _same_file(self._descriptor, self.path):
                os.unlink(self.path)
            os.close(self._descriptor)
            self._descriptor = None

    def check(self) -> None:
        """Raises a CheckpointError where this trainer has lost the workdir to another one (after being stopped for minutes, on an object store)."""
        if self._remote is not None:
            self._remote.check()

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
            "started": _STARTED}


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
