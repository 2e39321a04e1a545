"""The table of parameters that is printed at the start and kept in the workdir as parameters.txt."""
import math
from typing import Any

import numpy as np

from vlm_jax.training.stages import LeafRule, Rules
from vlm_jax.training.trees import flatten


def count_parameters(params: Any) -> int:
    """Returns the number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in flatten(params).values())


def parameter_bytes(params: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in flatten(params).values())


def parameter_table(params: Any, rules: Rules | None = None) -> str:
    """Returns a line a parameter: path, shape, dtype, count, bytes, how it lies on the mesh (if its leaves say so) and whether it is trained; then
    the totals.

    Args:
      params: arrays or shapes, with or without shardings.
      rules: the stage's rules; None leaves the last column out.
    """
    rows = [("parameter", "shape", "dtype", "count", "bytes", "sharding", "trained")]
    for path, leaf in flatten(params).items():
        count = math.prod(leaf.shape)
        rows.append((path, "x".join(map(str, leaf.shape)) or "scalar", str(leaf.dtype), f"{count:,}", f"{count * np.dtype(leaf.dtype).itemsize:,}",
                     _sharding(leaf), _trained(rules.leaves[path]) if rules else ""))
    columns = [column for column in range(7) if column < 5 or any(row[column] for row in rows[1:])]
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = ["  ".join(row[c].rjust(widths[c]) if c in (3, 4) else row[c].ljust(widths[c]) for c in columns).rstrip() for row in rows]
    return "\n".join([*lines, _total(params, rules)])


def _total(params: Any, rules: Rules | None) -> str:
    text = f"total: {count_parameters(params):,} parameters, {parameter_bytes(params) / 1e6:,.1f} MB"
    if rules is None:
        return text
    moving = 0
    for path, leaf in flatten(params).items():
        rule = rules.leaves[path]
        share = float(rule.mask.mean()) if rule.mask is not None else float(rule.moves)
        moving += round(math.prod(leaf.shape) * share)
    return f"{text}; {moving:,} trained"


def _sharding(leaf: Any) -> str:
    spec = getattr(getattr(leaf, "sharding", None), "spec", None)
    if spec is None:
        return ""
    names = ["+".join(axis) if isinstance(axis, tuple) else axis for axis in spec]
    return ",".join(name or "-" for name in names) if any(names) else "replicated"


def _trained(rule: LeafRule) -> str:
    if not rule.moves:
        return "frozen"
    if rule.mask is not None:
        return f"{int(rule.mask.sum())} of {rule.mask.size} layers"
    rates = np.unique(np.asarray(rule.lr))
    if rates.size > 1:
        return f"lr x {rates.min():g} to {rates.max():g}"
    return "yes" if rates[0] == 1 else f"lr x {rates[0]:g}"
