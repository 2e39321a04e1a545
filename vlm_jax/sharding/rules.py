"""Which mesh axes each parameter is split over: an ordered list of (regex, tactic), the first match wins.

A rule's regex must match the whole path (`image/blocks/attention/query/kernel`). A tactic is one or more of these, joined by commas:

    replicate       every device holds the whole parameter
    fsdp            the largest axis that divides is split over the mesh axis `fsdp`; parameters below `min_size` elements stay whole
    AXIS:K          axis K of the parameter (negative counts from the end) is split over the mesh axis AXIS, as `tensor:-1` or `expert:1`

so `tensor:-1,fsdp` splits the last axis over `tensor` and the largest of the others over `fsdp`.
"""
from collections.abc import Sequence
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.errors import ConfigError, did_you_mean

Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = ((".*", "fsdp"),)
MIN_SIZE = 2 ** 14   # splitting a smaller parameter costs more in latency than it saves in memory


def path_name(path: tuple) -> str:
    """The path of a leaf as text: keys, attributes and indices joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_shardings(mesh: Mesh, shapes: Any, rules: Rules | None = None, min_size: int = MIN_SIZE) -> Any:
    """Returns the tree of `shapes` (arrays or ShapeDtypeStructs) with a NamedSharding for each leaf.

    Args:
      rules: the ordered (regex, tactic) pairs; by default everything of at least `min_size` elements is fully sharded. A parameter that no rule
        matches is replicated.
    Raises:
      ConfigError: for a rule that matches no parameter, a malformed tactic, or an axis that does not divide by the mesh axis it names.
    """
    given = rules is not None
    rules = [tuple(rule) for rule in (rules if given else DEFAULT_RULES)]
    used = set()

    def choose(path, leaf) -> NamedSharding:
        name = path_name(path)
        for number, (pattern, tactic) in enumerate(rules):
            if re.fullmatch(pattern, name):
                used.add(number)
                return NamedSharding(mesh, _spec(mesh, name, tuple(leaf.shape), tactic, min_size))
        return NamedSharding(mesh, PartitionSpec())

    out = jax.tree_util.tree_map_with_path(choose, shapes)
    for number, (pattern, _) in enumerate(rules):
        if given and number not in used:
            raise ConfigError(f'sharding rule "{pattern}" matches no parameter that an earlier rule leaves; correct or remove it '
                              "(a rule must match the whole path, as image/blocks/.*).")
    return out


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...], tactic: str, min_size: int) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)
    size = 1
    for extent in shape:
        size *= extent
    for item in (item.strip() for item in tactic.split(",")):
        if item == "replicate":
            continue
        if item == "fsdp":
            _split_largest(mesh, name, shape, spec, size >= min_size)
            continue
        axis, _, index = item.partition(":")
        if axis not in mesh.axis_names or not re.fullmatch(r"-?\d+", index):
            raise ConfigError(f'sharding tactic "{item}" for {name}: give replicate, fsdp or AXIS:K with a mesh axis and a number.'
                              f'{did_you_mean(axis, ["replicate", "fsdp", *mesh.axis_names])}')
        k = int(index)
        if not -len(shape) <= k < len(shape):
            raise ConfigError(f'sharding tactic "{item}" for {name}: the parameter has {len(shape)} axes {shape}; '
                              f"give an axis from {-len(shape)} to {len(shape) - 1}.")
        if shape[k] % mesh.shape[axis]:
            raise ConfigError(f'sharding tactic "{item}" for {name}: axis {k} of {shape} does not divide by {axis}={mesh.shape[axis]}; '
                              "choose another axis or mesh size.")
        if spec[k] is not None:
            raise ConfigError(f'sharding tactic "{tactic}" for {name} splits axis {k} twice; name another axis.')
        if mesh.shape[axis] > 1:
            spec[k] = axis
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _split_largest(mesh: Mesh, name: str, shape: tuple[int, ...], spec: list[str | None], big: bool) -> None:
    parts = mesh.shape["fsdp"] if "fsdp" in mesh.axis_names else 1
    if parts == 1 or not big:
        return
    # The layer axis of stacked blocks is scanned over; splitting it would gather every layer at every step of the scan.
    first = 1 if "blocks" in name.split("/") and len(shape) > 1 else 0
    free = [k for k in range(first, len(shape)) if spec[k] is None and shape[k] % parts == 0]
    if free:
        spec[max(free, key=lambda k: (shape[k], k))] = "fsdp"


def state_shardings(mesh: Mesh, state: Any, parameters: Any, shardings: Any) -> Any:
    """The layout of a tree that follows the parameters (optimiser moments, EMA).

    A leaf of `state` whose path ends in the path of a parameter of the same shape is laid out like it (the longest such path wins); every other
    leaf is replicated.

    Args:
      state, parameters: trees of arrays or ShapeDtypeStructs.
      shardings: `parameter_shardings(mesh, parameters, ...)`.
    """
    known = {path: (tuple(leaf.shape), sharding) for (path, leaf), sharding in zip(
        ((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)), jax.tree.leaves(shardings))}

    def choose(path, leaf) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            shape, sharding = known.get("/".join(parts[start:]), (None, None))
            if shape == tuple(leaf.shape):
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(choose, state)
