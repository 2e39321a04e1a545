"""The device mesh, and the layout of a batch on it: rows are split over the axes `data` and `fsdp`, everything else is replicated."""
from collections.abc import Mapping, Sequence
from functools import lru_cache
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from vlm_jax.errors import ConfigError, DataError

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
BATCH_AXES = ("data", "fsdp")
PADDING = {"example_id": -1}   # what a padded row holds instead of 0


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1, slices: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh (data, fsdp, tensor, sequence, expert) of Auto axes; an axis of -1 takes the devices that the others leave.

    Args:
      slices: over how many slices (groups of devices with a fast network of their own, ICI, joined by a slower one, DCN) the axis `data` extends; the
        others stay inside one. TPUs know their slices, so that 1 stands for as many as there are; on other devices equal blocks, in the
        order of processes, stand for slices.
      devices: the devices to use, by default all of them; those of `jax.experimental.topologies` are taken as well. Inside a slice they are laid out
        along its physical network.
    Raises:
      ConfigError: if a size is neither positive nor -1, two sizes are -1, the sizes do not multiply to the number of devices, or `data` does not divide
        by the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, said = mesh_sizes(len(devices), data, fsdp, tensor, sequence, expert, slices)
    groups = _slices(devices, slices)
    _check_slices(sizes, said, len(groups))
    shape = (sizes["data"] // len(groups), *list(sizes.values())[1:])
    mesh = _mesh(np.concatenate([_inside(group, shape) for group in groups]))
    if len({device.process_index for device in devices}) > 1 and _shards_of_processes(mesh) is None:
        mesh = _mesh(np.concatenate([np.array(_in_order(group)).reshape(shape) for group in groups]))
    return mesh


def mesh_sizes(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1,
               slices: int = 1) -> tuple[dict[str, int], str]:
    """({axis: size} on that many devices, what was asked for as errors say it); arguments and errors as in `make_mesh`."""
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence, expert)))
    said = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1 or name == "data")
    for name, size in {**sizes, "slices": slices}.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or (size < 1 and (size != -1 or name == "slices")):
            remedy = "a positive number" if name == "slices" else "a positive number, or -1 for the devices that the other axes leave"
            raise ConfigError(f"mesh.{name} is {size!r}; give {remedy}.")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh {said}: {' and '.join(free)} are both -1; only one axis can take the rest, give the others a size.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if devices % fixed:
            raise ConfigError(f"mesh {said}: the fixed axes need a multiple of {fixed} devices, {devices} are present; "
                              f"choose sizes that divide {devices}.")
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        raise ConfigError(f"mesh {said} has {fixed} devices, {devices} are present; "
                          f"set one axis to -1 or choose sizes that multiply to {devices}.")
    _check_slices(sizes, said, slices)
    return {name: int(size) for name, size in sizes.items()}, said


def _check_slices(sizes: Mapping[str, int], said: str, slices: int) -> None:
    if sizes["data"] % slices:
        raise ConfigError(f"mesh {said}: data={sizes['data']} does not divide by the {slices} slices that it must span; make the other axes smaller, together "
                          "at most the devices of a slice.")


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _in_order(devices: Sequence[Any]) -> list[Any]:
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def _slices(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice, all of one length."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    physical = devices[0].platform == "tpu"
    if len(found) == slices or (physical and slices == 1):
        groups = [found[index] for index in sorted(found)]
    elif physical:
        raise ConfigError(f"mesh.slices={slices}: the devices lie in {len(found)} slice(s); set mesh.slices={len(found)}, or 1 to take what is there.")
    elif slices == 1:
        return [list(devices)]
    else:
        ordered, size = _in_order(devices), len(devices) // slices
        groups = [ordered[k * size:(k + 1) * size] for k in range(slices)]
    if len({len(group) for group in groups}) > 1:
        raise ConfigError(f"mesh: the slices have {', '.join(str(len(group)) for group in groups)} devices; use slices of one size.")
    return groups


def _inside(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices of one slice as an array of `shape`, neighbours on the physical network close to each other where JAX finds a way to."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    try:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError):   # no assignment, or a chip with two devices (TPU v4 as a topology, v2, v3)
        return np.array(sorted(devices, key=lambda device: (tuple(reversed(device.coords)), device.core_on_chip))).reshape(shape)


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
    """`(k, n)`: the process reads the k-th of n contiguous, equal blocks of the rows of a batch.

    Processes whose devices differ only along the other axes (tensor ...) share a block and must read the same rows. On TPUs the devices of a process need
    not be neighbours in the mesh: its block then fills the rows of the global array that it holds, which permutes the batch, and no loss depends on
    the order of its rows.
    Raises:
      ConfigError: if two processes hold some of the same rows, but not all.
    """
    process = jax.process_index() if process is None else process
    held = _shards_of_processes(mesh)
    if held is None or process not in held:
        raise ConfigError(f"mesh {dict(mesh.shape)}: the devices of process {process} share some of their rows with another process, but not all; make the "
                          "mesh with vlm_jax.sharding.make_mesh, or choose data x fsdp as a multiple of the number of processes.")
    blocks = sorted(set(held.values()))
    return blocks.index(held[process]), len(blocks)


def _shards_of_processes(mesh: Mesh) -> dict[int, tuple[int, ...]] | None:
    """{process: numbers of the shards of a batch on its devices}, or None unless any two processes hold the same or none in common."""
    axes = batch_axes(mesh)
    devices = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes))).reshape(batch_shards(mesh), -1)
    shards: dict[int, set[int]] = {}
    for shard, row in enumerate(devices):
        for device in row:
            shards.setdefault(device.process_index, set()).add(shard)
    held = {process: tuple(sorted(numbers)) for process, numbers in shards.items()}
    blocks = set(held.values())
    if len({len(block) for block in blocks}) > 1 or sum(len(block) for block in blocks) != batch_shards(mesh):
        return None
    return held


@lru_cache
def _parts_here(mesh: Mesh) -> int:
    """Into how many parts the rows of this process are split; cached, since it looks at every device of the mesh."""
    return batch_shards(mesh) // process_part(mesh)[1]


def to_host(tree: Any) -> Any:
    """The arrays of a tree as numpy, whole on every process; those of which other processes hold a part are gathered one after the other."""
    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            x = jax.jit(lambda y: y, out_shardings=replicated(x.sharding.mesh))(x)
        return np.asarray(x)

    return jax.tree.map(one, tree)


def padded_rows(mesh: Mesh, rows: int) -> int:
    """The rows of the global arrays of a batch of `rows`, which `put_batch` pads to a multiple of the devices that split them."""
    return -(-rows // batch_shards(mesh)) * batch_shards(mesh)


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
