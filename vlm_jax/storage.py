"""Small files on a local disk or an object store (gs://, s3://), with what both can do: whole writes, create-if-absent, list, delete.

Object stores cannot rename, append or lock, and a request may fail and succeed when it is made again. So nothing here renames, and requests to an
object store are repeated a few times. What has to be exclusive (the lock, the last-good pointer) is made by `create_if_absent`.
"""
from collections.abc import Callable
import hashlib
import os
import re
import socket
import time
from typing import Any, TypeVar

from vlm_jax.errors import CheckpointError

ATTEMPTS = 5                # requests to an object store before an error counts
FIRST_PAUSE_SECONDS = 0.1   # doubled after every failed request
_Result = TypeVar("_Result")


def is_remote(path: Any) -> bool:
    """Whether `path` is on an object store (gs://..., s3://...)."""
    return "://" in str(path)


def path_of(folder: Any):
    """`folder` as an `epath.Path`, absolute where it is local (Orbax wants that)."""
    from etils import epath
    path = epath.Path(folder)
    return path if is_remote(folder) else path.expanduser().absolute()


def patiently(path: Any, request: Callable[[], _Result]) -> _Result:
    """Returns `request()`; on an object store it is made up to `ATTEMPTS` times, since errors there pass. What is absent or refused is said at once."""
    if not is_remote(path):
        return request()
    pause = FIRST_PAUSE_SECONDS
    for _ in range(ATTEMPTS - 1):
        try:
            return request()
        except (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
            pause *= 2
    return request()


def create_if_absent(path: Any, data: bytes) -> bool:
    """Writes a new file and returns True, or returns False where there is one already. Of several writers exactly one gets True.

    `data` must be the writer's own (hold its name, process or a random number): that is how a request whose answer was lost is recognised. A file on
    a local disk may be seen half written, and stays so after a kill: readers take what does not parse as absent.

    Raises:
      OSError: if it cannot be written.
      CheckpointError: on an object store, if the package that speaks its protocol is missing.
    """
    if not is_remote(path):
        try:
            descriptor = os.open(os.fspath(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True
    system, name = _object_store(path)
    try:
        patiently(path, lambda: system.pipe_file(name, data, mode="create"))
        return True
    except FileExistsError:
        return patiently(path, lambda: _content(system, name)) == data


def write(path: Any, data: bytes) -> None:
    """Writes or replaces a whole file, in a folder that exists. On a local disk it is flushed to the disk; a kill may leave it cut short."""
    if is_remote(path):
        patiently(path, lambda: path_of(path).write_bytes(data))
        return
    with open(os.fspath(path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Any, data: bytes) -> None:
    """Writes or replaces a file so that a reader finds the old one, the new one, or none, never a part; makes its folder.

    On a local disk it is written beside its place first; what a process of this machine that was killed left there is removed.
    """
    if is_remote(path):
        write(path, data)
        return
    path = os.fspath(path)
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    beside = re.compile(re.escape(f"{name}.{socket.gethostname()}-") + r"(\d+)\.tmp")
    for entry in os.listdir(folder or "."):
        if (match := beside.fullmatch(entry)) and not _alive(int(match[1])):
            remove(os.path.join(folder, entry))
    temporary = f"{path}.{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        write(temporary, data)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read(path: Any, limit: int | None = None) -> bytes | None:
    """The bytes of a file, or None where there is none. Raises a ValueError if it is larger than `limit` bytes."""
    path = path_of(path)
    try:
        if limit is not None and (size := patiently(path, path.stat).length) > limit:
            raise ValueError(f"{path.name} has {size:,} bytes, more than the {limit:,} that such a file can have")
        return patiently(path, path.read_bytes)
    except FileNotFoundError:
        return None


def names(folder: Any) -> list[str]:
    """The names in a folder, sorted; none where there is no such folder."""
    folder = path_of(folder)
    try:
        return sorted(entry.name for entry in patiently(folder, lambda: list(folder.iterdir())))
    except FileNotFoundError:
        return []


def files(folder: Any) -> dict[str, tuple[int, int]]:
    """{name: (bytes, a number that is another one for another content)} of the files in a folder of an object store, by one listing.

    Raises:
      OSError: if it cannot be listed; where there is no such folder, a FileNotFoundError.
      CheckpointError: if the package that speaks its protocol is missing.
    """
    system, name = _object_store(folder)
    system.invalidate_cache(name)
    found = patiently(folder, lambda: system.ls(name, detail=True))
    return {entry["name"].rpartition("/")[2]: (int(entry["size"]), _version(entry)) for entry in found if entry["type"] == "file"}


def read_range(path: Any, start: int, size: int) -> bytes:
    """Bytes start ... start + size - 1 of a file on an object store, fewer where it ends before, by one request for them alone.

    Raises:
      OSError, CheckpointError: as `files`.
    """
    system, name = _object_store(path)
    return patiently(path, lambda: system.cat_file(name, start=start, end=start + size))


def _version(entry: dict[str, Any]) -> int:
    """A number of 62 bits from what a store says of an object's content: its generation, tag or sum, else when it was written; 0 if it says nothing."""
    said = next((str(entry[key]) for key in ("generation", "etag", "ETag", "md5Hash", "crc32c", "updated", "LastModified", "mtime") if entry.get(key)), "")
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 2 if said else 0


def exists(path: Any) -> bool:
    """Whether there is such a file or folder."""
    return patiently(path, path_of(path).exists)


def remove(path: Any) -> None:
    """Deletes a file; none is no error."""
    try:
        patiently(path, path_of(path).unlink)
    except FileNotFoundError:
        pass


def remove_tree(path: Any) -> None:
    """Deletes a folder and all in it; none is no error."""
    path = path_of(path)
    try:
        if patiently(path, path.is_dir):
            patiently(path, path.rmtree)
        else:
            patiently(path, path.unlink)
    except FileNotFoundError:
        pass


def _content(system: Any, name: str) -> bytes | None:
    try:
        return system.cat_file(name)
    except FileNotFoundError:
        return None


def _object_store(path: Any) -> tuple[Any, str]:
    """The fsspec file system of a path and the name within: epath itself has no create-if-absent."""
    try:
        import fsspec
        return fsspec.core.url_to_fs(str(path))
    except ImportError as error:
        raise CheckpointError(f"{path}: needs a package that is not installed ({error}); install gcsfs for gs://, s3fs for s3://.") from error
