"""Which mesh axes each parameter is split over: an ordered list of (regex, tactic), the first match wins.

A rule's regex must match the whole path (`image/blocks/attention/query/kernel`). One that matches nothing is an error, unless it is meant for any model and
begins with `.*`. A tactic is one or more of these, joined by commas and carried out in order:

    replicate       every device holds the whole parameter
    AXIS            the largest axis that divides is split over the mesh axis AXIS (`fsdp`, `tensor`); parameters below `min_size` elements stay whole
    AXIS:K          axis K of the parameter (negative counts from the end) is split over the mesh axis AXIS, as `tensor:-1` or `expert:1`
    AXIS:K|L|-      axis K, or L where K does not divide; a dash at the end leaves the parameter whole where none divides, which else is an error

so `tensor:-1,fsdp` splits the last axis over `tensor` and the largest of the others over `fsdp`.
"""
from collections.abc import Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.errors import ConfigError, did_you_mean

Rules = Sequence[tuple[str, str]]
DEFAULT_RULES: Rules = ((".*", "fsdp"),)
MIN_SIZE = 2 ** 14   # splitting a smaller parameter costs more in latency than it saves in memory
REPLICATED_LIMIT, LARGE_MODEL = 0.02, 100_000_000   # of a model above that size at most this share may stay replicated


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
        if given and number not in used and not pattern.startswith(".*"):
            raise ConfigError(f'sharding rule "{pattern}" matches no parameter that an earlier rule leaves; correct or remove it '
                              "(a rule must match the whole path, as image/blocks/.*).")
    return out


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...], tactic: str, min_size: int) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)
    for item in (item.strip() for item in tactic.split(",")):
        axis, colon, choices = item.partition(":")
        if item == "replicate":
            continue
        if axis not in mesh.axis_names or (colon and not re.fullmatch(r"-?\d+(\|-?\d+)*(\|-)?", choices)):
            raise ConfigError(f'sharding tactic "{item}" for {name}: give replicate, AXIS or AXIS:K with a mesh axis and a number.'
                              f'{did_you_mean(axis, ["replicate", *mesh.axis_names])}')
        if not colon:
            _split_largest(mesh.shape[axis], axis, name, shape, spec, min_size)
            continue
        numbers = choices.split("|")
        for number in (int(number) for number in numbers if number != "-"):
            if not -len(shape) <= number < len(shape):
                raise ConfigError(f'sharding tactic "{item}" for {name}: the parameter has {len(shape)} axes {shape}; '
                                  f"give an axis from {-len(shape)} to {len(shape) - 1}.")
            if shape[number] % mesh.shape[axis] == 0:
                if spec[number] is not None:
                    raise ConfigError(f'sharding tactic "{tactic}" for {name} splits axis {number} twice; name another axis.')
                if mesh.shape[axis] > 1:
                    spec[number] = axis
                break
        else:
            if numbers[-1] != "-":
                raise ConfigError(f'sharding tactic "{item}" for {name}: no axis {choices} of {shape} divides by {axis}={mesh.shape[axis]}; '
                                  "choose another axis or mesh size, or allow it whole with |- at the end.")
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _split_largest(parts: int, axis: str, name: str, shape: tuple[int, ...], spec: list[str | None], min_size: int) -> None:
    # The layer axis of stacked blocks is scanned over; splitting it would gather every layer at every step of the scan.
    first = 1 if "blocks" in name.split("/") and len(shape) > 1 else 0
    if parts == 1 or math.prod(shape) < min_size:
        return
    free = [k for k in range(first, len(shape)) if spec[k] is None and shape[k] % parts == 0]
    if free:
        spec[max(free, key=lambda k: (shape[k], k))] = axis


def replicated_share(shapes: Any, shardings: Any) -> tuple[float, list[str]]:
    """Which parameters every device holds whole: their share of all elements, and their paths, the largest first.

    Args:
      shapes: a tree of arrays or ShapeDtypeStructs.
      shardings: their NamedShardings; a parameter that is split over any axis of more than one device is not replicated.
    """
    leaves = [(path_name(path), math.prod(leaf.shape)) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]
    total = sum(size for _, size in leaves)
    whole = [(size, name) for (name, size), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True) if _is_whole(sharding)]
    return sum(size for size, _ in whole) / max(total, 1), [name for _, name in sorted(whole, key=lambda item: (-item[0], item[1]))]


def check_replicated(shapes: Any, shardings: Any, *, limit: float = REPLICATED_LIMIT, large: int = LARGE_MODEL) -> None:
    """Raises a ConfigError if a model of more than `large` parameters has more than the share `limit` replicated on a mesh with fsdp or tensor above 1."""
    leaves = jax.tree.leaves(shardings)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    if not leaves or total <= large or max(leaves[0].mesh.shape.get(axis, 1) for axis in ("fsdp", "tensor")) == 1:
        return
    share, paths = replicated_share(shapes, shardings)
    if share > limit:
        sizes = " x ".join(f"{axis}={size}" for axis, size in leaves[0].mesh.shape.items() if size > 1)
        raise ConfigError(f"sharding: {share:.1%} of the {total / 1e6:,.0f} M parameters stay replicated on {sizes} (allowed: {limit:.0%}), the largest: "
                          f"{', '.join(paths[:3])}; choose mesh sizes that divide their axes (powers of two up to 128), or change config.sharding.")


def _is_whole(sharding: NamedSharding) -> bool:
    axes = (axis for entry in sharding.spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry))
    return all(sharding.mesh.shape[axis] == 1 for axis in axes)


def state_shardings(mesh: Mesh, state: Any, parameters: Any, shardings: Any) -> Any:
    """The layout of a tree that follows the parameters (optimiser moments, EMA).

    A leaf of `state` whose path ends in the path of a parameter of the same shape is laid out like it (the longest such path wins). One that has the
    parameter's shape without one of its axes (a factored second moment) keeps the split of the axes that are left; where several axes could be the
    missing one, only what holds whichever it is. Every other leaf is replicated.

    Args:
      state, parameters: trees of arrays or ShapeDtypeStructs.
      shardings: `parameter_shardings(mesh, parameters, ...)`.
    """
    known = {path: (tuple(leaf.shape), sharding) for (path, leaf), sharding in zip(
        ((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)), jax.tree.leaves(shardings))}

    def choose(path, leaf) -> NamedSharding:
        parts, found = path_name(path).split("/"), tuple(leaf.shape)
        for start in range(len(parts)):
            shape, sharding = known.get("/".join(parts[start:]), (None, None))
            if shape == found:
                return sharding
            if shape is not None and len(shape) == len(found) + 1:
                return NamedSharding(mesh, _without_one_axis(shape, found, sharding.spec))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(choose, state)


def _without_one_axis(shape: tuple[int, ...], found: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    entries = [*spec, *(None,) * (len(shape) - len(spec))]
    possible = [entries[:k] + entries[k + 1:] for k in range(len(shape)) if shape[:k] + shape[k + 1:] == found]
    kept = [choices[0] if len(set(choices)) == 1 else None for choices in zip(*possible)]
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)
