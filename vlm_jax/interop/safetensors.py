"""The safetensors format: a reader that trusts nothing before it is checked, and the one writer, which reads back what it wrote.

A file is the length of its header (eight bytes, little endian), the header (JSON: name -> dtype, shape, offsets) and the bytes of the tensors, without
holes. Nothing is mapped into memory: a read takes the bytes it needs into the array it returns.
"""
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import hashlib
import json
import math
import mmap
import os
import stat
import struct
from typing import Any

import ml_dtypes
import numpy as np

from vlm_jax import storage
from vlm_jax.errors import CheckpointError, did_you_mean

MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 16
MAX_SIDE = 2 ** 48
CHUNK_BYTES = 16 * 2 ** 20
LARGE_BYTES = 2 ** 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")

DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32, "U64": np.uint64,
    "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64, "C64": np.complex64, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu}.items()}
_NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [begin, end) of the file."""
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is computed when it is written: `compute() -> array` of this shape and dtype."""
    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array; a large one begins at a page, and its memory is given back to the system as soon as nobody holds it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE_BYTES:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), np.uint8).view(dtype).reshape(shape)


class TensorFile:
    """The tensors of one safetensors file, or of the several files of a folder; made by `open_file` and `open_folder`."""

    def __init__(self, where: str, entries: Mapping[str, tuple[str, Entry]], metadata: Mapping[str, str]):
        self.where, self._entries, self.metadata = where, dict(entries), dict(metadata)

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor; bfloat16 and float8 kinds are those of ml_dtypes."""
        return self._entry(name)[1].dtype

    def nbytes(self, name: str) -> int:
        """The size of a tensor in bytes."""
        entry = self._entry(name)[1]
        return entry.end - entry.begin

    def read(self, name: str, index: Any = None) -> np.ndarray:
        """Returns a tensor as a new array, or the part of it that `index` (an int, slice or tuple of them) selects.

        Of the first axis only the selected range is read; a part of further axes is taken from it piece by piece, so that the memory used is that of the
        result and `CHUNK_BYTES`.

        Raises:
          CheckpointError: for an unknown name, or a file that became shorter meanwhile.
          IndexError: for an index outside the tensor.
        """
        path, entry = self._entry(name)
        with open(path, "rb", buffering=0) as file:
            if index is None or not entry.shape:
                out = empty(entry.shape, entry.dtype)
                _read_into(file, entry.begin, out.reshape(-1).view(np.uint8), path, name)
                return out if index is None else out[index]
            first, *rest = index if isinstance(index, tuple) else (index,)
            if isinstance(first, (int, np.integer)):
                place = range(entry.shape[0])[first]
                span = range(place, place + 1)
            elif isinstance(first, slice):
                span = range(entry.shape[0])[first]
            else:
                raise IndexError(f"{name}: the index {index!r} is not made of numbers and slices.")
            rest = (slice(None), *rest)
            row = np.broadcast_to(np.zeros((), entry.dtype), (1, *entry.shape[1:]))[rest]
            out = empty((len(span), *row.shape[1:]), entry.dtype)
            if out.size:
                self._read_rows(file, path, name, entry, span, rest, out)
            return out[0] if isinstance(first, (int, np.integer)) else out

    def _read_rows(self, file: Any, path: str, name: str, entry: Entry, span: range, rest: tuple, out: np.ndarray) -> None:
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        if span.step == 1 and out.shape[1:] == entry.shape[1:]:
            _read_into(file, entry.begin + span[0] * row_bytes, out.reshape(-1).view(np.uint8), path, name)
            return
        step = max(1, CHUNK_BYTES // max(row_bytes, 1)) if span.step == 1 else 1
        for start in range(0, len(span), step):
            count = min(step, len(span) - start)
            rows = np.empty((count, *entry.shape[1:]), entry.dtype)
            _read_into(file, entry.begin + span[start] * row_bytes, rows.reshape(-1).view(np.uint8), path, name)
            out[start:start + count] = rows[rest]

    def _entry(self, name: str) -> tuple[str, Entry]:
        if name not in self._entries:
            raise CheckpointError(f"{self.where}: there is no tensor {show(name)}.{did_you_mean(name, self._entries)}")
        return self._entries[name]


def open_file(path: str | os.PathLike) -> TensorFile:
    """Opens one .safetensors file: its header is read and checked, its tensors are not.

    Raises:
      CheckpointError: naming file, item, cause and remedy, if it is missing, is another format, or is damaged.
    """
    path = os.fspath(path)
    if path.lower().endswith(PICKLED):
        raise CheckpointError(f"{path}: {refuse_pickle()}")
    entries, metadata = _read_header(path)
    return TensorFile(path, {name: (path, entry) for name, entry in entries.items()}, metadata)


def open_folder(folder: str | os.PathLike) -> TensorFile:
    """Opens the weights of a folder: model.safetensors, or the files that model.safetensors.index.json names.

    Raises:
      CheckpointError: as `open_file`; also if a file lies outside the folder, or index and files differ.
    """
    folder = os.fspath(folder)
    single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
    if os.path.lexists(single):
        return open_file(inside(folder, SINGLE))
    if not os.path.lexists(index):
        found = sorted(name for name in _listing(folder) if name.lower().endswith((*PICKLED, ".safetensors", ".npz")))
        cause = f"it holds {', '.join(found[:4])}; " if found else ""
        pickled = any(name.lower().endswith(PICKLED) for name in found) and not any(name.endswith(".safetensors") for name in found)
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}; {cause}{refuse_pickle() if pickled else 'name a folder that has them.'}")
    listed = read_json(inside(folder, INDEX))
    mapping = listed.get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"{index}: weight_map must map names of tensors to names of files; fetch the file again.")
    entries: dict[str, tuple[str, Entry]] = {}
    for name in dict.fromkeys(mapping.values()):
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: the file {show(name)} is not a .safetensors file of the same folder; correct the index.")
        path = inside(folder, name)
        for tensor, entry in _read_header(path)[0].items():
            if mapping.get(tensor) != name:
                raise CheckpointError(f"{path}: the index does not list {show(tensor)} for this file; fetch index and files of one release.")
            entries[tensor] = (path, entry)
    for tensor, name in mapping.items():
        if tensor not in entries:
            raise CheckpointError(f"{os.path.join(folder, name)}: {show(tensor)} is missing, which the index lists; fetch index and files of one release.")
    return TensorFile(folder, entries, {})


def refuse_pickle() -> str:
    """What to do with a pickled checkpoint, which is never opened: it may run any program."""
    return ("pickled weights (.bin, .pt, .ckpt) can run any program when opened and are never read; use a release in safetensors, or convert where you trust "
            "the file: in transformers, from_pretrained(DIR).save_pretrained(NEW).")


def inside(folder: str, name: str) -> str:
    """The path of a file of a folder.

    Raises:
      CheckpointError: if it is missing, is no regular file, or a link leads out of the folder.
    """
    path = os.path.join(folder, name)
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise CheckpointError(f"{path}: a link leads out of the folder; copy the folder with its files (cp -rL) and load the copy.")
    _check_regular(path)
    return path


def read_json(path: str, limit: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The JSON object in a file; a CheckpointError if it is missing, larger than `limit` bytes, no JSON object, or has a key twice."""
    size = _check_regular(path)
    if size > limit:
        raise CheckpointError(f"{path}: {size:,} bytes are too many for such a file (at most {limit:,}); fetch it again.")
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions.") from None
    return parse_json(content, path)


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `content` spells, without duplicate keys and without NaN; a CheckpointError otherwise."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:   # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{where}: this is no sound JSON ({' '.join(str(error).split())[:120]}); fetch the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: JSON with an object is expected, got a {type(value).__name__}; fetch the file again.")
    return value


def show(value: Any) -> str:
    """A value from a file as one short printable line."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {show(twice)} is there twice")
    return made


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _listing(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror or error}); name a folder with weights.") from None


def _check_regular(path: str) -> int:
    """The size of a regular file; anything else (missing, folder, pipe, device) is a CheckpointError."""
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path.") from None
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError(f"{path}: this is no regular file; check the path.")
    return state.st_size


def _read_header(path: str) -> tuple[dict[str, Entry], dict[str, str]]:
    size = _check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file; fetch it again.")
            length = struct.unpack("<Q", start)[0]
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(f"{path}: its header claims {length:,} bytes, the file has {size:,} and at most {MAX_HEADER_BYTES:,} are allowed; "
                                      "it is cut off or no safetensors file: fetch it again.")
            content = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions.") from None
    return check_header(content, size - 8 - length, path)


def check_header(content: bytes, data_bytes: int, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of a header, compared with the `data_bytes` that follow it in the file.

    Raises:
      CheckpointError: for anything that a sound header would not have.
    """
    header = parse_json(content, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map strings to strings; fetch the file again.")
    first = 8 + len(content)
    entries = {name: _entry(name, described, first, where) for name, described in header.items()}
    end = first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            what = "overlaps another tensor" if entry.begin < end else "leaves a hole before it"
            raise CheckpointError(f"{where}: {show(name)} begins at byte {entry.begin - first:,} and {what}; fetch the file again.")
        end = entry.end
    if end - first != data_bytes:
        raise CheckpointError(f"{where}: its tensors need {end - first:,} bytes, the file has {data_bytes:,}; it is cut off or damaged: fetch it again.")
    return entries, metadata


def _entry(name: str, described: Any, first: int, where: str) -> Entry:
    def bad(cause: str) -> CheckpointError:
        return CheckpointError(f"{where}: {show(name)}: {cause}; fetch the file again.")

    _check_name(name, bad)
    if not isinstance(described, dict) or set(described) != {"dtype", "shape", "data_offsets"}:
        raise bad("it must have dtype, shape and data_offsets")
    dtype = described["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"the dtype {show(dtype)} is unknown (known: {', '.join(DTYPES)})")
    shape, offsets = described["shape"], described["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(type(side) is int and 0 <= side <= MAX_SIDE for side in shape):
        raise bad(f"the shape {show(shape)} is not a list of at most {MAX_AXES} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int and 0 <= offset < 2 ** 63 for offset in offsets):
        raise bad(f"data_offsets {show(offsets)} are not two positions")
    if math.prod(max(side, 1) for side in shape) >= 2 ** 60:
        raise bad(f"the shape {show(shape)} is larger than any memory")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise bad(f"{dtype} of shape {show(shape)} needs {needed:,} bytes, its offsets hold {end - begin:,}")
    return Entry(DTYPES[dtype], tuple(shape), first + begin, first + end)


def _check_name(name: str, bad: Callable[[str], Exception]) -> None:
    parts = name.replace("\\", "/").split("/")
    if not name or len(name) > 1024 or ".." in parts or parts[0] == "" or not name.isprintable():
        raise bad("a name must be printable, not absolute, and without ..")


def _read_into(file: Any, position: int, out: np.ndarray, path: str, name: str) -> None:
    view, done = memoryview(out), 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:done + 2 ** 30]], position + done)
        if count == 0:
            raise CheckpointError(f"{path}: {show(name)} cannot be read whole; the file became shorter while it was open: fetch it again.")
        done += count


def write_file(path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file: contiguous, little endian, beside its place, read back and compared, and then renamed.

    Args:
      tensors: name -> array (numpy or jax) or `Lazy`.
      metadata: strings; {"format": "pt"} is what transformers asks for.
    Raises:
      CheckpointError: for a dtype or name that the format does not have, or a file that reads back differently.
    """
    path = os.fspath(path)
    planned = {name: value if isinstance(value, Lazy) else _given(value) for name, value in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, order = 0, sorted(planned, key=lambda name: -planned[name].dtype.itemsize)   # stable: every tensor stays aligned to its items
    for name in order:
        _check_name(name, lambda cause, name=name: CheckpointError(f"{path}: {show(name)}: {cause}; rename it."))
        dtype, shape = planned[name].dtype, planned[name].shape
        if dtype not in _NAMES_OF_DTYPES:
            raise CheckpointError(f"{path}: {show(name)}: safetensors has no dtype {dtype}; convert it to one of {', '.join(DTYPES)}.")
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES_OF_DTYPES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    content += b" " * (-len(content) % 8)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        digests = {}
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(content)) + content)
            for name in order:
                digests[name] = _write_tensor(file, path, name, planned[name])
            file.flush()
            os.fsync(file.fileno())
        _verify(temporary, path, planned, digests)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); choose a folder with room that you may write.") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _given(value: Any) -> Lazy:
    dtype = np.dtype(value.dtype).newbyteorder("=") if np.dtype(value.dtype).kind != "V" else np.dtype(value.dtype)
    return Lazy(tuple(value.shape), dtype, lambda: value)


def _write_tensor(file: Any, path: str, name: str, tensor: Lazy) -> bytes:
    array = np.asarray(tensor.compute())
    if array.shape != tensor.shape:
        raise CheckpointError(f"{path}: {show(name)} came out as {array.shape}, {tensor.shape} was announced; this is a bug of the weight table.")
    data = np.ascontiguousarray(array, tensor.dtype.newbyteorder("<") if tensor.dtype.kind in "iufc" else tensor.dtype)
    view = memoryview(data.reshape(-1).view(np.uint8))
    for start in range(0, len(view), CHUNK_BYTES):
        file.write(view[start:start + CHUNK_BYTES])
    return hashlib.blake2b(view).digest()


def _verify(temporary: str, path: str, planned: Mapping[str, Lazy], digests: Mapping[str, bytes]) -> None:
    written = open_file(temporary)
    if set(written.names()) != set(planned):
        raise CheckpointError(f"{path}: the file reads back with other tensors than were written; the disk or memory is faulty: write elsewhere.")
    for name, digest in digests.items():
        if hashlib.blake2b(memoryview(written.read(name).reshape(-1).view(np.uint8))).digest() != digest:
            raise CheckpointError(f"{path}: {show(name)} reads back differently than it was written; the disk or memory is faulty: write elsewhere.")


def write_folder(folder: str | os.PathLike, tensors: Mapping[str, Any], shard_bytes: int = 5_000_000_000,
                 metadata: Mapping[str, str] | None = None) -> list[str]:
    """Writes model.safetensors, or above `shard_bytes` several files and their index; returns the names of the files.

    What the folder had of another set of weights is removed when the new one is complete.

    Raises:
      CheckpointError: see `write_file`.
    """
    folder = os.fspath(folder)
    os.makedirs(folder, exist_ok=True)
    metadata = {"format": "pt"} if metadata is None else metadata
    parts: list[dict[str, Any]] = [{}]
    sizes, used = {name: math.prod(value.shape) * np.dtype(value.dtype).itemsize for name, value in tensors.items()}, 0
    for name, value in tensors.items():
        if parts[-1] and used + sizes[name] > shard_bytes:
            parts.append({})
            used = 0
        parts[-1][name] = value
        used += sizes[name]
    names = [SINGLE] if len(parts) == 1 else [f"model-{k + 1:05d}-of-{len(parts):05d}.safetensors" for k in range(len(parts))]
    for name, part in zip(names, parts):
        write_file(os.path.join(folder, name), part, metadata)
    kept: Iterable[str] = names
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": {tensor: name for name, part in zip(names, parts) for tensor in part}}
        storage.write_whole(os.path.join(folder, INDEX), (json.dumps(index, indent=2) + "\n").encode())
        kept = [*names, INDEX]
    for stale in os.listdir(folder):
        if stale not in kept and (stale in (SINGLE, INDEX) or (stale.startswith("model-") and stale.endswith(".safetensors"))):
            os.remove(os.path.join(folder, stale))
    return list(kept)
