"""Reading of files by position, with limits: every file source builds on these few functions. Some sources also read object stores (gs://, s3://)."""
from collections.abc import Sequence
import fnmatch
import glob
import os
import re
import stat

from vlm_jax import storage
from vlm_jax.data.problems import problem
from vlm_jax.errors import CheckpointError, ConfigError, DataError

MAX_BYTES = 64 * 2**20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_MAX_PATHS = 1_000_000


def read_span(path: str, offset: int, size: int, item: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns bytes offset ... offset + size - 1 of a file, local or remote. Keeps no file open, so that it works in any thread and process.

    Raises:
      DataError: with reason file_too_large, file_unreadable or file_cut.
    """
    if size > max_bytes:
        raise problem("file_too_large", f"{item}: {size} bytes, over the limit of {max_bytes}; shrink the file or remove the record.")
    if storage.is_remote(path):
        try:
            data = storage.read_range(path, offset, size) if size else b""
        except Exception as error:      # the packages that speak to object stores have errors of their own
            raise problem("file_unreadable", f"{item}: {os.path.basename(path)} cannot be read ({short(error)}); is it still there?") from error
        return _whole(data, size, path, item)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            data = os.pread(descriptor, size, offset)
            while 0 < len(data) < size:
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        finally:
            os.close(descriptor)
    except OSError as error:
        raise problem("file_unreadable", f"{item}: {os.path.basename(path)} cannot be read ({error.strerror}); is it still there?") from error
    return _whole(data, size, path, item)


def _whole(data: bytes, size: int, path: str, item: str) -> bytes:
    if len(data) != size:
        raise problem("file_cut", f"{item}: {os.path.basename(path)} ends early; it was changed or cut, copy it again.")
    return data


class RangeReader:
    """A file on an object store for a reader of headers: `seek` and `read`, a block a request, of which one is kept.

    Raises:
      DataError: from `read`, if the store does not answer.
    """

    def __init__(self, path: str, size: int, block: int):
        self._path, self._size, self._least = path, size, block
        self._position = self._start = 0
        self._block = b""

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, size: int) -> bytes:
        """Returns the next bytes, fewer at the end of the file."""
        size = max(0, min(size, self._size - self._position))
        if not self._start <= self._position <= self._position + size <= self._start + len(self._block):
            wanted = min(max(size, self._least), self._size - self._position)
            self._start, self._block = self._position, read_span(self._path, self._position, wanted, "index", max(size, self._least))
        offset = self._position - self._start
        self._position += size
        return self._block[offset:offset + size]

def read_file(path: str, item: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the bytes of a regular file, at most `max_bytes`. Raises as `read_span`, and image_missing where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise problem("image_missing", f"{item}: there is no file {path[:200]}; add it or remove the record.")
    return read_span(path, 0, status.st_size, item, max_bytes)


def inside(folder: str, relative: str, item: str) -> str:
    """Returns the path of `relative` within `folder`, links resolved.

    Raises:
      DataError: with reason path_outside if it leads out of the folder, be it by `..`, as an absolute path or over a link.
    """
    folder = os.path.realpath(folder)
    if "\0" in relative:
        raise problem("path_outside", f"{item}: the path {relative!r} holds a zero byte; correct it.")
    path = os.path.realpath(os.path.join(folder, relative))
    if not path.startswith(os.path.join(folder, "")):
        raise problem("path_outside", f'{item}: the path "{relative}" leads out of the image folder; use paths below it or set a folder above.')
    return path


def expand_paths(patterns: str | os.PathLike | Sequence[str], where: str, remote: bool = False) -> list[str]:
    """Returns the files that patterns stand for, in order: `{000..010}` and `{a,b}` expand, then `*`, `?` and `[...]` match files.

    Args:
      remote: whether files on object stores are taken; of their paths only the last part may have `*`, `?` and `[...]`.
    Raises:
      DataError: for a file that is not there, a pattern that matches nothing, a store that cannot be listed, or one that this source does not read.
    """
    if isinstance(patterns, (str, os.PathLike)):
        patterns = [os.fspath(patterns)]
    paths, listings = [], {}
    for pattern in patterns:
        for path in expand_braces(os.path.expanduser(str(pattern))):
            if storage.is_remote(path):
                if not remote:
                    raise DataError(f"{where}: {path} is on an object store, and this source reads local files; copy it, or mount the bucket (gcsfuse).")
                folder, _, name = path.rpartition("/")
                names = listed(folder, where, listings)
                found = [name] if name in names else sorted(fnmatch.filter(names, name)) if glob.has_magic(name) else []
                if not found:
                    raise DataError(f"{where}: there is no file {path}; correct the path.")
                paths.extend(f"{folder}/{name}" for name in found)
            elif os.path.exists(path):
                paths.append(path)
            elif glob.has_magic(path):
                found = sorted(glob.glob(path, recursive=True))
                if not found:
                    raise DataError(f"{where}: no file matches {path}; correct the pattern.")
                paths.extend(found)
            else:
                raise DataError(f"{where}: there is no file {path}; correct the path.")
    if not paths:
        raise DataError(f"{where}: no files are given; name at least one.")
    return paths


def listed(folder: str, where: str, listings: dict[str, dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Returns `storage.files(folder)`, from `listings` where it is there, else put there.

    Raises:
      DataError: if the store cannot be listed.
    """
    if folder not in listings:
        try:
            listings[folder] = storage.files(folder)
        except FileNotFoundError:
            raise DataError(f"{where}: there is no folder {folder}; correct the path.") from None
        except CheckpointError as error:
            raise DataError(f"{where}: {error}") from None
        except Exception as error:
            raise DataError(f"{where}: {folder} cannot be listed ({short(error)}); check the path and your credentials.") from error
    return listings[folder]


def short(error: Exception, length: int = 160) -> str:
    """Returns the first line of an error that is not ours, at most so long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:length]


def expand_braces(pattern: str) -> list[str]:
    """Returns the strings that `{000..010}` (zeros kept) and `{a,b}` stand for, leftmost slowest; `"{x}"` alone stays as it is."""
    match = next((m for m in _BRACES.finditer(pattern) if _RANGE.match(m[1]) or "," in m[1]), None)
    if match is None:
        return [pattern]
    numbers = _RANGE.match(match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        step = 1 if last >= first else -1
        width = max(len(numbers[1]), len(numbers[2])) if numbers[1].startswith("0") or numbers[2].startswith("0") else 0
        choices = [f"{i:0{width}d}" for i in _limited(range(first, last + step, step), pattern)]
    else:
        choices = match[1].split(",")
    rests = expand_braces(pattern[match.end():])
    _limited(range(len(choices) * len(rests)), pattern)
    return [pattern[:match.start()] + choice + rest for choice in choices for rest in rests]


def _limited(values: range, pattern: str) -> range:
    if len(values) > _MAX_PATHS:
        raise ConfigError(f"{pattern} stands for more than {_MAX_PATHS} files; correct the range.")
    return values
