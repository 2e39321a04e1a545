"""A run that hangs ends: with the stacks of all threads, in words, with an exit code that a launcher starts again."""
import faulthandler
import os
import sys
import tempfile
import threading
import time

from vlm_jax.errors import HangError
from vlm_jax.storage import is_remote

COMPILE_SECONDS = 7200.0   # what compiling a step may take, where `seconds` is less
START_SECONDS = 900.0      # what a start-up, a restore or a batch of an evaluation may take: each compiles something smaller
_SHARE = 20                # the time is looked at so many times in `seconds`, at most every 5 seconds
_WRITE_SECONDS = 5.0       # what writing hang.txt may take: the file system may be what hangs


class Watchdog:
    """Ends the process with exit code 77 if `beat` is not called for `seconds`.

    Then the stack of every Python thread goes to stderr and into `path`, after a line that names what was being done. A process that was stopped (SIGSTOP,
    a laptop that slept) is not taken for one that hangs. A C extension that waits without releasing Python's lock is beyond it.

    Args:
      seconds: how long nothing may happen; None watches nothing.
      path: the file for the stacks.
    """

    def __init__(self, seconds: float | None, path: str | os.PathLike):
        self.seconds, self.path = seconds, os.fspath(path)
        self._lock = threading.Lock()
        self._what, self._limit, self._silent = "start-up", seconds, 0.0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="vlm_jax watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, what: str, seconds: float | None = None) -> None:
        """Says that the program is alive and what it does next; `seconds` allows that more time than the others have."""
        with self._lock:
            self._what, self._silent = what, 0.0
            self._limit = self.seconds if self.seconds is None or seconds is None else max(self.seconds, seconds)

    def _watch(self) -> None:
        tick = min(5.0, self.seconds / _SHARE)
        before = time.monotonic()
        while not self._end.wait(tick):
            now = time.monotonic()
            with self._lock:
                self._silent += min(now - before, 2 * tick)   # what lies beyond was spent stopped
                what, hangs, limit = self._what, self._silent > self._limit, self._limit
            before = now
            if hangs:
                self._leave(what, limit)

    def _leave(self, what: str, limit: float) -> None:
        message = str(HangError(f"{what} has not ended in {limit:g} s, the stacks of all threads are in {self.path}; start again with the same command, "
                                "or raise watchdog.seconds."))
        text = f"error: {message}\n{stacks()}"
        os.write(2, text.encode(errors="replace"))      # not sys.stderr: the thread that hangs may hold its lock
        writer = threading.Thread(target=_write, args=(self.path, text), daemon=True)
        writer.start()
        writer.join(_WRITE_SECONDS)
        os._exit(HangError.exit_code)


def stacks() -> str:
    """Returns the Python stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:      # faulthandler writes to file descriptors only
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _write(path: str, text: str) -> None:
    try:
        if is_remote(path):
            from etils import epath
            epath.Path(path).write_text(text)
            return
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror or error})", file=sys.stderr)
