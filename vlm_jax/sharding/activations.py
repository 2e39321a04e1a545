"""Activations are constrained by logical names; one table says which mesh axes a name is split over.

Modules write `x = constrain(x, "batch", "sequence", "embed")` and know no mesh. The loop enters the mesh with `jax.set_mesh(mesh)`; without one, on
one device, and inside `jax.shard_map` (where the axes are manual and every array is already local) a constraint does nothing.
"""
import math

import jax
from jax.sharding import AxisType, PartitionSpec

from vlm_jax.errors import did_you_mean

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "keys": (),          # what every query reads: gathered over `sequence`
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "layers": (),
    "embed": (),
    "head_dim": (),
    "height": (),
    "width": (),
    "channels": (),
}


def logical_spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh) -> PartitionSpec:
    """The partition of an array of `shape` whose axes carry the logical `names`, on `mesh` (concrete or abstract).

    A name of None, or one whose table row is empty, is replicated: that keeps the sharding of a parameter (fsdp) from spreading into the
    activations. Mesh axes that the mesh lacks, that are manual (inside `shard_map`) or of size one are passed over, and of the rest the longest
    prefix that divides the dimension is used. Where none does, the dimension is whole on every device (tokens that do not divide by `sequence`, heads that
    do not divide by `tensor`); rows are left to the compiler.
    Raises:
      ValueError: for a name that is not in the table, or when names and dimensions differ in number.
    """
    if len(names) != len(shape):
        raise ValueError(f"constrain: {len(names)} names {names} for an array of shape {tuple(shape)}; give one name (or None) for each axis.")
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    entries = []
    for size, name in zip(shape, names):
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f'constrain: "{name}" is not a logical axis.{did_you_mean(name, LOGICAL_AXES)}')
        wanted = [a for a in LOGICAL_AXES.get(name, ()) if types.get(a) is AxisType.Auto and mesh.shape[a] > 1]
        used = list(wanted)
        while used and size % math.prod(mesh.shape[a] for a in used):
            used.pop()
        if used:
            entries.append(tuple(used) if len(used) > 1 else used[0])
        else:
            entries.append(PartitionSpec.UNCONSTRAINED if wanted and name == "batch" else None)
    return PartitionSpec(*entries)


def is_split(name: str) -> bool:
    """Whether the mesh that is set splits activations along the logical axis `name` (where their size divides)."""
    mesh = jax.sharding.get_abstract_mesh()
    types = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types))
    return any(types.get(axis) is AxisType.Auto and mesh.shape[axis] > 1 for axis in LOGICAL_AXES[name])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to lay out `x` by the logical names of its axes; returns `x` itself when no mesh is set.

    Args:
      x: any array (of any dtype), one axis for each name.
      names: keys of `LOGICAL_AXES`, or None for an axis that is replicated.
    Raises:
      ValueError: with a mesh set, for an unknown name or a wrong number of names.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not any(t is AxisType.Auto and mesh.shape[a] > 1 for a, t in zip(mesh.axis_names, mesh.axis_types)):
        return x
    return jax.lax.with_sharding_constraint(x, logical_spec(x.shape, names, mesh))
