"""Reads the arrays of a step straight from TensorStore, in any process by itself, and verifies each against its digest.

A process reads only the parts that its devices hold. There is no barrier inside: where one process of a pod fails to read, all of them learn it before
they compute the digests together.
"""
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vlm_jax import distributed, faults
from vlm_jax.errors import CheckpointError
from vlm_jax.storage import is_remote
from vlm_jax.training import digests
from vlm_jax.training.checkpoint_format import Damaged, dtype_of, num_bytes, one_line

_AT_ONCE = 1 << 30      # bytes of arrays that are read at the same time
# How TensorStore's errors begin when the storage, not its content, is the cause: such a step is not damaged.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED")


def read_onto_devices(path: Any, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads the arrays named by `wanted` into their shardings (without one: the first device) and verifies them there, after any resharding.

    Args:
      path: the step's folder.
      wanted: {name: array or `jax.ShapeDtypeStruct`}, of the stored shapes and dtypes.
      stored: {name: {"shape", "dtype", "digest"}}, the metadata's.
    Raises:
      Damaged: naming the arrays.
    """
    arrays, damage, name = {}, None, ""
    try:
        for group in _groups(wanted, stored):
            opened = {name: _open(path, name, stored[name]) for name in group}
            parts = {}
            for name in group:
                parts[name] = _start_reading(opened[name].result(), wanted[name], name, stored[name])
            for name in group:
                arrays[name] = _place(parts.pop(name), wanted[name], stored[name])
    except Damaged as error:
        damage = error
    except ValueError as error:     # what TensorStore raises when a file cannot be opened or decoded
        damage = _judge(path, name, error)
    if _anywhere(damage is not None):
        raise damage or Damaged("its arrays could not be read by another process")
    faults.point("checkpoint.verify")
    _check(digests.digests({name: array for name, array in arrays.items() if array.size}), stored)
    return {name: arrays[name] for name in wanted}


def read_on_host(path: Any, stored: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the arrays described by `stored` one after the other as numpy, each verified; yields (name, array).

    Raises:
      Damaged: naming the array.
    """
    for name, leaf in stored.items():
        if not num_bytes(leaf):
            yield name, np.zeros(leaf["shape"], np.dtype(leaf["dtype"]))
            continue
        try:
            array = _checked(_open(path, name, leaf).result(), name, leaf).read().result()
        except ValueError as error:
            raise _judge(path, name, error) from error
        _check({name: digests.host_digest(array)}, stored)
        yield name, array


def verify(path: Any, stored: Mapping[str, Any]) -> None:
    """Reads every array back and compares its digest, one array in memory at a time. Raises Damaged naming the first that differs."""
    for _ in read_on_host(path, stored):
        pass


def _groups(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[list[str]]:
    group, size = [], 0
    for name in wanted:
        size += num_bytes(stored[name])
        if group and size > _AT_ONCE:
            yield group
            group, size = [], num_bytes(stored[name])
        group.append(name)
    yield group


def _open(path: Any, name: str, leaf: Mapping[str, Any]):
    import tensorstore
    if not num_bytes(leaf):
        return _Absent()        # Orbax does not store arrays without elements
    folder = f"{path}/state/"
    # The names inside are Orbax's: the parts of the path joined by dots.
    base = folder if is_remote(path) else {"driver": "file", "path": folder}
    return tensorstore.open({"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}}, open=True, read=True)


class _Absent:
    def result(self) -> None:
        return None


def _checked(store: Any, name: str, leaf: Mapping[str, Any]):
    """The opened array, if its shape and dtype are those of the metadata: nothing is allocated for a damaged one."""
    if list(store.shape) != leaf["shape"] or store.dtype.name != leaf["dtype"]:
        raise Damaged(f"{name} is {store.dtype.name}{list(store.shape)} in its file, {leaf['dtype']}{leaf['shape']} in the metadata")
    return store


def _start_reading(store: Any, leaf: Any, name: str, stored: Mapping[str, Any]) -> dict[Any, Any]:
    """{key of a part: its value to come} for the parts of an array that this process holds."""
    if store is None:
        return {}
    store = _checked(store, name, stored)
    indices = _sharding(leaf).addressable_devices_indices_map(tuple(stored["shape"])).values()
    return {key: store[index].read() for key, index in {_key(index): index for index in indices}.items()}


def _place(parts: Mapping[Any, Any], leaf: Any, stored: Mapping[str, Any]) -> jax.Array:
    shape = tuple(stored["shape"])
    values = {key: np.asarray(part.result()) for key, part in parts.items()}
    if not num_bytes(stored):
        return jax.device_put(np.zeros(shape, dtype_of(leaf)), _sharding(leaf))
    return jax.make_array_from_callback(shape, _sharding(leaf), lambda index: values[_key(index)])


def _key(index: tuple[slice, ...]) -> tuple:
    return tuple((part.start, part.stop) for part in index)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _judge(path: Any, name: str, error: ValueError) -> Damaged:
    """A Damaged naming the array; or raises a CheckpointError where the storage is at fault."""
    text = one_line(error)
    if any(word in text for word in _PASSING):
        raise CheckpointError(f"{path}: {name} cannot be read ({text}); check permissions and the connection, and start again.") from error
    return Damaged(f"{name} cannot be read: {text}")


def _check(found: Mapping[str, str], stored: Mapping[str, Any]) -> None:
    wrong = [name for name, value in found.items() if value != stored[name]["digest"]]
    if wrong:
        raise Damaged(f"{len(wrong)} of {len(found)} arrays differ from their digest: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
                      if len(found) > 1 else f"{wrong[0]} differs from its digest")


def _anywhere(flag: bool) -> bool:
    """Whether the flag is up in any process of a pod."""
    return flag if jax.process_count() == 1 else distributed.any_process(flag, "checkpoint.read")
