"""Parameter trees as flat tables: `{"image/blocks/mlp/up/kernel": leaf}`, and the layer axis of stacked blocks."""
from collections.abc import Mapping
from typing import Any

import jax

from vlm_jax.interop.table import nested

STACK = "blocks"   # what lies below a module of this name is stored stacked, with a leading layer axis
LORA = "lora"      # the module of an adapter's leaves, below the `Linear` that it changes (training/adapters.py)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} of a nested tree, the path's parts joined by `/`, in the order in which JAX visits the leaves.

    Raises:
      ValueError: if two leaves have one path.
    """
    table: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = "/".join(_name(key) for key in keys)
        if path in table:
            raise ValueError(f'two leaves of the tree have the path "{path}": rename one of the keys.')
        table[path] = leaf
    return table


def unflatten(table: Mapping[str, Any]) -> dict:
    """Returns the nested dicts of a {path: leaf} table; the inverse of `flatten` for trees of dicts."""
    return nested(table)


def is_stacked(path: str) -> bool:
    """Returns whether a leaf lies below a `blocks` module, so that its first axis counts layers."""
    return STACK in path.split("/")[:-1]


def is_adapter(path: str) -> bool:
    """Returns whether a leaf belongs to a low-rank adapter."""
    return LORA in path.split("/")[:-1]


def virtual_paths(path: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the paths that rules match: one a layer (`image/blocks/7/mlp/up/kernel`) for a stacked leaf, else the path itself."""
    if not is_stacked(path):
        return [path]
    parts = path.split("/")
    place = parts.index(STACK) + 1
    return ["/".join(parts[:place] + [str(layer)] + parts[place:]) for layer in range(shape[0])]


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
