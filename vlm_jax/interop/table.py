"""Weight tables: rows that say which tensor of theirs is which parameter of ours. Data, read in both directions.

    Row("vision_model.encoder.layers.{i}.mlp.fc1.weight", "image/blocks/mlp/up/kernel", linear)

`{i}` counts layers and is the leading axis of our parameter. Either side may be several names, for fused projections. `Tied` is a key that repeats another
one, `Ignored` a pattern of keys without meaning (buffers).
"""
from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, Protocol

import jax
import numpy as np

from vlm_jax.errors import CheckpointError, did_you_mean
from vlm_jax.interop.filling import Leaf
from vlm_jax.interop.safetensors import Lazy, show
from vlm_jax.interop.transforms import Transform, as_tuple, identity


class Source(Protocol):
    """Where tensors come from: `safetensors.TensorFile`, `npz.NpzFile`, or `Arrays` of a dict."""
    where: str

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def read(self, name: str, index: Any = None) -> np.ndarray: ...


class Arrays:
    """A `Source` of arrays in memory (numpy, jax)."""

    def __init__(self, arrays: Mapping[str, Any], where: str = "the given arrays"):
        self.where, self._arrays = where, dict(arrays)

    def names(self) -> list[str]:
        """The names."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one."""
        return tuple(self._arrays[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one."""
        return np.dtype(self._arrays[name].dtype)

    def read(self, name: str, index: Any = None) -> np.ndarray:
        """One array, or a part of it."""
        array = np.asarray(self._arrays[name])
        return array if index is None else array[index]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter (or the parts of a fused one).

    Attributes:
      theirs, ours: a name, or a tuple of names; with `{i}` in every name of theirs, every one of ours has a leading layer axis.
      transform: turns the arrays of theirs into those of ours, and back.
    """
    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    transform: Transform = identity


@dataclasses.dataclass(frozen=True)
class Tied:
    """The key `theirs`, where it is present, repeats the key `of` bit for bit (a head tied to the token table); it is not written."""
    theirs: str
    of: str


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Keys that match the regex `pattern` as a whole are buffers without information; they are not written."""
    pattern: str


Rows = Sequence[Row | Tied | Ignored]


@dataclasses.dataclass(frozen=True)
class _Task:
    """The tensors that give one layer (or all) of a row."""
    theirs: tuple[str, ...]
    row: Row
    layer: int | None


def read(rows: Rows, source: Source, shapes: Any, shardings: Any = None, dtype: Any = None, *, prefix: str = "",
         renames: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Reads parameters, each tensor straight to its place: of the weights only one tensor at a time is held beside the parameters.

    Args:
      rows: the table.
      source: where the tensors are.
      shapes: the parameter tree of the model as ShapeDtypeStructs (`jax.eval_shape`); decides shapes and numbers of layers, not dtypes.
      shardings: a tree of shardings of that structure, or one sharding for all; None is the default device.
      dtype: what floating-point parameters become; None keeps the dtype of each tensor.
      prefix: what names of theirs begin with in some files and not in others ("model."): where no name of the source begins so, it is left out.
      renames: (regex, replacement) pairs applied to the names of the source: older layouts of the same family.
    Returns:
      the parameters, nested dicts of jax arrays.
    Raises:
      CheckpointError: naming the first few keys that are missing, not consumed, or do not fit.
    """
    wanted = flat(shapes)
    placed = _flat_shardings(shardings, wanted)
    names = _names(source, prefix, renames, rows)
    tasks = plan(rows, {path: tuple(leaf.shape) for path, leaf in wanted.items()})
    _check_names(tasks, rows, names, source.where)
    for row in rows:
        if isinstance(row, Tied) and row.theirs in names:
            _check_tied(source, names[row.theirs], names[row.of])
    leaves: dict[str, Any] = {}
    waiting = _uses(tasks)
    for task in tasks:
        arrays = tuple(source.read(names[name]) for name in task.theirs)
        kinds = [array.dtype for array in arrays]
        shown = f"{source.where}: {', '.join(show(name) for name in task.theirs)}"
        try:
            arrays = as_tuple(task.row.transform.to_ours(*arrays))
        except (ValueError, IndexError) as error:
            found = ", ".join(str(source.shape(names[name])) for name in task.theirs)
            raise CheckpointError(f"{shown} has shape {found}, which does not fit the config ({error}); use config.json and weights of one release.") from None
        for path in _tuple(task.row.ours):
            array, arrays = arrays[0], arrays[1:]
            shape = tuple(wanted[path].shape)
            expected = shape if task.layer is None else shape[1:]
            if array.shape != expected:
                raise CheckpointError(f"{shown} gives {path} the shape {array.shape}, the config asks for {expected}; use config.json and weights of one "
                                      "release.")
            kind = np.dtype(dtype) if dtype is not None and jax.numpy.issubdtype(kinds[0], jax.numpy.floating) else array.dtype
            leaf = leaves.get(path)
            if leaf is None:
                leaf = leaves[path] = Leaf(shape, kind, placed[path])
            if leaf.dtype != kind:
                raise CheckpointError(f"{shown} has dtype {kind}, other layers have {leaf.dtype}; give load a dtype.")
            leaf.put(task.layer, array)
            waiting[path] -= 1
            if waiting[path] == 0:
                leaves[path] = leaf.finish()
        del array, arrays
    return nested(leaves)


def write(rows: Rows, params: Any) -> dict[str, Lazy]:
    """The tensors that a table makes of parameters: name -> `Lazy`, for `safetensors.write_file` and `write_folder`; the inverse of `read`.

    Raises:
      CheckpointError: if the table and the parameters are not of one model.
    """
    leaves = flat(params)
    tensors: dict[str, Lazy] = {}
    for task in plan(rows, {path: tuple(np.shape(leaf)) for path, leaf in leaves.items()}):
        paths = _tuple(task.row.ours)

        def inputs(task=task, paths=paths) -> list[np.ndarray]:
            return [np.asarray(leaves[path] if task.layer is None else leaves[path][task.layer]) for path in paths]

        def layer_shape(path: str, task=task) -> tuple[int, ...]:
            return tuple(leaves[path].shape)[0 if task.layer is None else 1:]
        # Shapes come from arrays that repeat one zero, so that nothing is computed before it is written.
        blank = [np.broadcast_to(np.zeros((), leaves[path].dtype), layer_shape(path)) for path in paths]
        for number, (name, array) in enumerate(zip(task.theirs, as_tuple(task.row.transform.to_theirs(*blank)), strict=True)):
            def compute(task=task, inputs=inputs, number=number) -> np.ndarray:
                return as_tuple(task.row.transform.to_theirs(*inputs()))[number]
            tensors[name] = Lazy(tuple(array.shape), array.dtype, compute)
    return tensors


def plan(rows: Rows, shapes: Mapping[str, tuple[int, ...]]) -> list[_Task]:
    """The rows with `{i}` counted out, all layers of a parameter after one another.

    Raises:
      CheckpointError: if a row names a parameter that the model does not have, or a parameter has no row or two.
    """
    tasks, seen = [], set()
    for row in rows:
        if not isinstance(row, Row):
            continue
        paths, names = _tuple(row.ours), _tuple(row.theirs)
        for path in paths:
            if path not in shapes:
                raise CheckpointError(f"the weight table has a row for {path}, which the model does not have.{did_you_mean(path, shapes)}")
            if path in seen:
                raise CheckpointError(f"the weight table has two rows for {path}; remove one.")
            seen.add(path)
        if "{i}" in names[0]:
            tasks += [_Task(tuple(name.replace("{i}", str(layer)) for name in names), row, layer) for layer in range(shapes[paths[0]][0])]
        else:
            tasks.append(_Task(names, row, None))
    missing = sorted(set(shapes) - seen)
    if missing:
        raise CheckpointError(f"the weight table has no row for {_few(missing)}; add it, or leave the part out of the model.")
    return tasks


def _names(source: Source, prefix: str, renames: Sequence[tuple[str, str]], rows: Rows) -> dict[str, str]:
    """{name as the rows have it: name in the source}."""
    names: dict[str, str] = {}
    found = source.names()
    strip = bool(prefix) and not any(name.startswith(prefix) for name in found)
    inner = {name for row in rows if not isinstance(row, Ignored) for name in _tuple(row.theirs) if not name.startswith(prefix)}
    for original in found:
        name = original
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if strip and name not in inner:
            name = prefix + name
        if name in names:
            raise CheckpointError(f"{source.where}: {show(names[name])} and {show(original)} are the same parameter in two layouts; remove one of them.")
        names[name] = original
    return names


def _check_names(tasks: Sequence[_Task], rows: Rows, names: Mapping[str, str], where: str) -> None:
    needed = {name for task in tasks for name in task.theirs}
    missing = [name for task in tasks for name in task.theirs if name not in names]
    tied = {row.theirs for row in rows if isinstance(row, Tied)}
    ignored = [re.compile(row.pattern) for row in rows if isinstance(row, Ignored)]
    extra = [name for name in names if name not in needed and name not in tied and not any(pattern.fullmatch(name) for pattern in ignored)]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing: {_few(missing)}.{did_you_mean(missing[0], extra) if extra else ''} "
                              "Use config.json and weights of one release.")
    if extra:
        hint = did_you_mean(extra[0], needed)
        raise CheckpointError(f"{where}: {len(extra)} tensors are not consumed: {_few(extra)}.{hint if 'Did' in hint else ''} "
                              "The config describes another model: use config.json and weights of one release.")


def _check_tied(source: Source, name: str, of: str) -> None:
    same = source.shape(name) == source.shape(of) and source.dtype(name) == source.dtype(of)
    rows = source.shape(of)[0] if same and source.shape(of) else 0
    step = max(1, rows // 64)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        same = same and source.read(name, part).tobytes() == source.read(of, part).tobytes()
    if not same:
        raise CheckpointError(f"{source.where}: {show(name)} differs from {show(of)}, which the config ties it to; set tie_word_embeddings to false in "
                              "config.json, or use config.json and weights of one release.")


def _uses(tasks: Sequence[_Task]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for task in tasks:
        for path in _tuple(task.row.ours):
            uses[path] = uses.get(path, 0) + 1
    return uses


def _few(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(show(name) for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def flat(tree: Any) -> dict[str, Any]:
    """Returns nested dicts as {path: leaf}; a path's parts are joined by `/`."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _flat_shardings(shardings: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(wanted, shardings)
    return flat(shardings)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: leaf} as nested dicts; a path's parts are joined by `/`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
