"""The device mesh, and the layout of a batch on it: rows are split over the axes `data` and `fsdp`, everything else is replicated."""
from collections.abc import Mapping, Sequence
from functools import lru_cache
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from vlm_jax.errors import ConfigError, DataError

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
BATCH_AXES = ("data", "fsdp")
PADDING = {"example_id": -1}   # what a padded row holds instead of 0


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh (data, fsdp, tensor, sequence, expert) of Auto axes; an axis of -1 takes the devices that the others leave.

    Args:
      devices: the devices to use, by default all of them. With several processes they are laid out so that each process holds a contiguous
        block of batch rows.
    Raises:
      ConfigError: if a size is neither positive nor -1, two sizes are -1, or the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence, expert)))
    said = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1 or name == "data")
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or (size < 1 and size != -1):
            raise ConfigError(f"mesh.{name} is {size!r}; give a positive number, or -1 for the devices that the other axes leave.")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh {said}: {' and '.join(free)} are both -1; only one axis can take the rest, give the others a size.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            raise ConfigError(f"mesh {said}: the fixed axes need a multiple of {fixed} devices, {len(devices)} are present; "
                              f"choose sizes that divide {len(devices)}.")
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ConfigError(f"mesh {said} has {fixed} devices, {len(devices)} are present; "
                          f"set one axis to -1 or choose sizes that multiply to {len(devices)}.")
    mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    if len({device.process_index for device in devices}) > 1 and _blocks(mesh) is None:
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        mesh = Mesh(np.array(ordered).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return mesh


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of `mesh` that split the rows of a batch."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts `mesh` splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: the first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def process_part(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """`(k, n)`: the process reads the k-th of n contiguous, equal blocks of the rows of a global batch.

    Processes whose devices differ only along the other axes (tensor ...) share a block and must read the same rows.
    Raises:
      ConfigError: if the devices of the processes do not form equal contiguous blocks of rows.
    """
    process = jax.process_index() if process is None else process
    blocks = _blocks(mesh)
    if blocks is None or process not in blocks:
        raise ConfigError(f"mesh {dict(mesh.shape)}: the devices of process {process} hold no contiguous block of rows; make the mesh with "
                          "vlm_jax.sharding.make_mesh, or choose data x fsdp as a multiple of the number of processes.")
    first, size = blocks[process]
    return first // size, batch_shards(mesh) // size


def _blocks(mesh: Mesh) -> dict[int, tuple[int, int]] | None:
    """{process: (first shard, number of shards)} of the rows of a batch, or None where they are not equal aligned blocks."""
    axes = batch_axes(mesh)
    devices = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes))).reshape(batch_shards(mesh), -1)
    shards: dict[int, set[int]] = {}
    for shard, row in enumerate(devices):
        for device in row:
            shards.setdefault(device.process_index, set()).add(shard)
    size = len(next(iter(shards.values())))
    blocks = {}
    for process, held in shards.items():
        first = min(held)
        if held != set(range(first, first + size)) or first % size:
            return None
        blocks[process] = (first, size)
    return blocks


@lru_cache
def _parts_here(mesh: Mesh) -> int:
    """Into how many parts the rows of this process are split; cached, since it looks at every device of the mesh."""
    return batch_shards(mesh) // process_part(mesh)[1]


def put_batch(batch: Mapping[str, Any], mesh: Mesh | None = None) -> dict[str, Any]:
    """Turns a host batch (numpy, rows on the first axis; each process gives its own rows) into global arrays laid out by `batch_sharding`.

    A batch, or a stream of one (`{stream: batch}`), whose rows do not divide by the devices that split them is padded at the end of each
    process's block with rows of zeros (example_id -1), which count nothing because their `mask` is False and their `weight` 0.
    Raises:
      DataError: if the arrays of a batch differ in their number of rows, or rows would have to be padded where there is neither `mask` nor
        `weight` to mark them.
    """
    parts = 1 if mesh is None else _parts_here(mesh)

    def put(batch: Mapping[str, Any], where: str) -> dict[str, Any]:
        arrays = {name: value for name, value in batch.items() if not isinstance(value, Mapping)}
        out = {name: put(value, f"{where}.{name}") for name, value in batch.items() if isinstance(value, Mapping)}
        rows = {name: np.shape(value)[0] if np.ndim(value) else None for name, value in arrays.items()}
        if len(set(rows.values())) > 1 or None in rows.values():
            raise DataError(f"{where}: the arrays have {rows} rows; every array needs one row for each example on its first axis.")
        missing = -next(iter(rows.values()), 0) % parts
        if missing and not {"mask", "weight"} & set(arrays):
            raise DataError(f"{where}: {next(iter(rows.values()))} rows do not divide by {parts} devices and no mask or weight can mark padding; "
                            f"choose a batch size that is a multiple of {parts}.")
        for name, value in arrays.items():
            value = np.asarray(value)
            if missing:
                value = np.concatenate([value, np.full((missing, *value.shape[1:]), PADDING.get(name, 0), value.dtype)])
            out[name] = jax.device_put(value) if mesh is None else jax.make_array_from_process_local_data(batch_sharding(mesh), value)
        return out

    return put(batch, "batch")
