"""big_vision's checkpoints: an .npz whose keys are paths with slashes, bfloat16 stored as two void bytes. Nothing is unpickled."""
import math
import os
from typing import Any
import zipfile
import zlib

import ml_dtypes
import numpy as np

from vlm_jax.errors import CheckpointError, did_you_mean
from vlm_jax.interop.safetensors import CHUNK_BYTES, MAX_AXES, MAX_SIDE, show

FREE_BYTES, MAX_RATIO = 64 * 2 ** 20, 100   # a file that inflates to more than both is no file of weights
_VOID_BFLOAT16 = np.dtype("V2")


class NpzFile:
    """The arrays of an .npz, read one at a time; a `table.Source`.

    Raises:
      CheckpointError: if the file is missing, no .npz, damaged, holds Python objects, or claims to inflate beyond reason.
    """

    def __init__(self, path: str | os.PathLike):
        self.where = os.fspath(path)
        if not os.path.isfile(self.where):
            raise CheckpointError(f"{self.where}: there is no such file; check the path.")
        self._entries: dict[str, tuple[str, tuple[int, ...], np.dtype, int, bool]] = {}
        try:
            with zipfile.ZipFile(self.where) as archive:
                listed = archive.infolist()
                total, size = sum(entry.file_size for entry in listed), os.path.getsize(self.where)
                if total > max(FREE_BYTES, MAX_RATIO * size):
                    raise CheckpointError(f"{self.where}: {size:,} bytes claim to hold {total:,}; this is no file of weights: fetch it again.")
                for entry in listed:
                    self._add(archive, entry)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, RuntimeError, MemoryError,
                SyntaxError, RecursionError, OverflowError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.where}: this is no sound .npz ({' '.join(str(error).split())[:100]}); fetch it again.") from None

    def _add(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
        name = entry.filename.removesuffix(".npy")
        if name == entry.filename or not name or not name.isprintable() or ".." in name.split("/") or name.startswith("/") or len(name) > 1024:
            raise CheckpointError(f"{self.where}: {show(entry.filename)} is no name of an array; fetch the file again.")
        if name in self._entries:
            raise CheckpointError(f"{self.where}: {show(name)} is there twice; fetch the file again.")
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise CheckpointError(f"{self.where}: {show(name)} has the format {version}, which is unknown; save it again with numpy.")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            begin = stream.tell()
        if dtype.hasobject:
            raise CheckpointError(f"{self.where}: {show(name)} holds Python objects, which can run any program when opened; save it as numbers.")
        if dtype.fields or dtype.subdtype or dtype.kind not in "biufc" and dtype != _VOID_BFLOAT16:
            raise CheckpointError(f"{self.where}: {show(name)} has the dtype {dtype}; numbers are expected.")
        if len(shape) > MAX_AXES or any(side > MAX_SIDE for side in shape) or math.prod(shape) * dtype.itemsize != entry.file_size - begin:
            raise CheckpointError(f"{self.where}: {show(name)} of shape {show(shape)} does not fit its {entry.file_size - begin:,} bytes; fetch it again.")
        self._entries[name] = (entry.filename, tuple(shape), dtype, begin, fortran)

    def names(self) -> list[str]:
        """The names, without .npy."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array."""
        return self._entry(name)[1]

    def dtype(self, name: str) -> np.dtype:
        """The dtype of an array: two void bytes are bfloat16."""
        dtype = self._entry(name)[2]
        return np.dtype(ml_dtypes.bfloat16) if dtype == _VOID_BFLOAT16 else dtype.newbyteorder("=")

    def read(self, name: str, index: Any = None) -> np.ndarray:
        """One array, or the part of it that `index` selects (a compressed file has to be read up to there all the same)."""
        filename, shape, dtype, begin, fortran = self._entry(name)
        out = np.empty(math.prod(shape), dtype)
        view = memoryview(out.view(np.uint8))
        try:
            with zipfile.ZipFile(self.where) as archive, archive.open(filename) as stream:
                stream.read(begin)
                done = 0
                while done < len(view):
                    count = stream.readinto(view[done:done + CHUNK_BYTES])
                    if not count:
                        raise EOFError("it ends too early")
                    done += count
                stream.read(1)   # the end, where the archive's own checksum is compared
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.where}: {show(name)} is damaged ({' '.join(str(error).split())[:80]}); fetch the file again.") from None
        out = out.reshape(shape, order="F" if fortran else "C")
        if dtype == _VOID_BFLOAT16:
            out = out.view(ml_dtypes.bfloat16)
        elif not dtype.isnative:
            out = out.astype(dtype.newbyteorder("="))
        return out if index is None else out[index]

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], np.dtype, int, bool]:
        if name not in self._entries:
            raise CheckpointError(f"{self.where}: there is no array {show(name)}.{did_you_mean(name, self._entries)}")
        return self._entries[name]
