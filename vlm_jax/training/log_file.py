"""`log.txt`: what the terminal shows, kept in the workdir."""
import os
import sys
import threading
from typing import TextIO

from vlm_jax.storage import is_remote

LARGEST_BYTES = 10 * 2**20
KEPT = 5      # log.1.txt, the newest of the older ones, ... log.4.txt


class LogFile:
    """Copies what is printed (stdout and stderr) into `workdir/log.txt` while the `with` block runs; later starts of a run add to it.

    At `largest` bytes it becomes `log.1.txt`, that `log.2.txt` and so on; `kept` files stay. A file that cannot be written is done without. On object stores,
    which can neither append nor rename, there is none; on a pod, process 0 writes.
    """

    def __init__(self, workdir: str | os.PathLike, largest: int = LARGEST_BYTES, kept: int = KEPT):
        self.path = os.path.join(os.fspath(workdir), "log.txt")
        self._largest, self._kept = largest, kept
        self._lock = threading.Lock()
        self._file = None
        self._terminal: tuple[TextIO, TextIO] | None = None

    def __enter__(self) -> "LogFile":
        import jax
        if jax.process_index() != 0 or is_remote(self.path):
            return self
        try:
            self._file = open(self.path, "ab", buffering=0)     # unbuffered: a kill loses nothing
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({error.strerror or error}); there will be no log.", flush=True)
            return self
        self._terminal = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = _Both(sys.stdout, self), _Both(sys.stderr, self)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._terminal is None:
            return
        sys.stdout, sys.stderr = self._terminal
        self._terminal = None
        if error is not None:       # printed by the command line, when this file is closed
            self.write(f"{kind.__name__}: {error}\n")
        self._file.close()
        self._file = None

    def write(self, text: str) -> None:
        """Adds text to the file alone."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(text.encode(errors="replace"))
                if text.endswith("\n") and self._file.tell() >= self._largest:
                    self._rotate()
            except OSError:      # the terminal has it
                pass

    def _rotate(self) -> None:
        self._file.close()
        older = [self.path] + [f"{self.path.removesuffix('.txt')}.{number}.txt" for number in range(1, self._kept)]
        for newer, old in reversed(list(zip(older, older[1:]))):
            if os.path.exists(newer):
                os.replace(newer, old)
        self._file = open(self.path, "wb" if self._kept == 1 else "ab", buffering=0)


class _Both:
    """A text stream that is written to the terminal and the log; everything else is the terminal's."""

    def __init__(self, terminal: TextIO, log: LogFile):
        self._terminal, self._log = terminal, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._terminal.write(text)

    def __getattr__(self, name: str):
        return getattr(self._terminal, name)
