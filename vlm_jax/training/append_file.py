"""A file that grows: appended on a local disk, rewritten from memory now and then on object stores, which cannot append."""
import errno
import logging
import os
import time
from typing import Any

from vlm_jax import storage
from vlm_jax.storage import is_remote

_REWRITE_SECONDS = 30.0
_log = logging.getLogger(__name__)


class AppendFile:
    """`write` adds bytes; they are on disk, or soon on the object store, without the file ever being closed.

    Args:
      path: where; the folder is made.
      keep: what the file holds at first; it replaces an older file in one move.
    """

    def __init__(self, path: Any, keep: bytes = b""):
        self.path = path
        self._remote = is_remote(path)
        self._written_at = 0.0
        if self._remote:
            self._content = bytearray(keep)
            self._rewrite()
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.tmp"
            with open(temporary, "wb") as file:
                file.write(keep)
            os.replace(temporary, path)
            self._file = open(path, "ab", buffering=0)     # closed by close(); unbuffered: a kill loses nothing written

    def write(self, data: bytes) -> None:
        """Adds `data` at the end, as a whole or, where that raises an OSError, not at all.

        An object store that does not answer is a warning: the bytes stay in memory, and the next rewrite has them; `flush` and `close` insist.
        """
        if not self._remote:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self._file.truncate(size)
                raise
            return
        self._content += data
        if time.monotonic() - self._written_at > _REWRITE_SECONDS:
            try:
                self._rewrite()
            except OSError as error:
                self._written_at = time.monotonic()
                _log.warning("WARNING: %s could not be written (%s); it is tried again in %.0f s.", self.path, error, _REWRITE_SECONDS)

    def flush(self) -> None:
        """Makes sure that all is written, so that a kill loses nothing."""
        if self._remote:
            self._rewrite()

    def close(self) -> None:
        """Makes sure that all is written; may be called twice."""
        if self._remote:
            self._rewrite()
        else:
            self._file.close()

    def _rewrite(self) -> None:
        storage.write(self.path, bytes(self._content))
        self._written_at = time.monotonic()
