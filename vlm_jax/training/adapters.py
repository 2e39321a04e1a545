"""Low-rank adapters and int8 kernels as changes to a tree of parameters: the model, its settings and every program that runs it stay the same.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1: a frozen kernel W gets a trained product of rank r,
W + (alpha / r) A B; A starts random and B at 0, so that the adapted model is the base to the last bit until it is trained. `nn/linear.py` says how the leaves
are computed with.

Targets are regexes over whole paths of `Linear`s as they are stored, such as `.*/attention/(query|value)`: a stack of blocks is one path, and all of its
layers are adapted. Quantised kernels may carry adapters, which train in float32 as ever.
"""
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.nn.linear import input_axes
from vlm_jax.settings import call
from vlm_jax.training.trees import LORA, flatten, is_stacked, unflatten

SCALE = "scale"
LEVELS = 127   # of int8, symmetric: -127 .. 127


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The stage setting `lora`.

    Attributes:
      targets: regexes of the `Linear`s that get an adapter.
      rank: columns of A; alpha: the adapter is multiplied by alpha / rank.
      dropout: the share of the adapter's inputs that training drops.
    """
    targets: Sequence[str]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0


def read_lora(settings: Mapping[str, Any], where: str = "lora") -> LoraSettings:
    """Returns the checked settings.

    Raises:
      ConfigError: naming `where.key`.
    """
    lora = call(LoraSettings, settings, where)
    _patterns(lora.targets, f"{where}.targets")
    if type(lora.rank) is not int or lora.rank < 1:
        raise ConfigError(f"{where}.rank is {lora.rank!r}; it must be an integer of at least 1.")
    if isinstance(lora.alpha, bool) or not isinstance(lora.alpha, (int, float)) or not 0 < lora.alpha < math.inf:
        raise ConfigError(f"{where}.alpha is {lora.alpha!r}; it must be a positive number, such as twice the rank.")
    if isinstance(lora.dropout, bool) or not isinstance(lora.dropout, (int, float)) or not 0 <= lora.dropout < 1:
        raise ConfigError(f"{where}.dropout is {lora.dropout!r}; it must be at least 0 and below 1.")
    return lora


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """A `Linear` as its parameters show it: the shape of its kernel in one layer, split into inputs and features; layers is () or (depth,)."""
    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def rows(self) -> int:
        """All inputs as one axis."""
        return math.prod(self.inputs)

    @property
    def columns(self) -> int:
        """All features as one axis."""
        return math.prod(self.features)


def linears(params: Any) -> dict[str, LinearShape]:
    """Returns {path: shape} of all `Linear`s of a tree of arrays or shapes; convolutions, whose kernels have a `gain`, are none and read no adapter."""
    table, found = flatten(params), {}
    for path, leaf in table.items():
        module, _, name = path.rpartition("/")
        stacked = int(is_stacked(path))
        if name == "kernel" and leaf.ndim - stacked >= 2 and f"{module}/gain" not in table:
            bias = table.get(f"{module}/bias")
            split = stacked + input_axes(module, leaf.ndim - stacked, None if bias is None else bias.ndim - stacked)
            found[module] = LinearShape(tuple(leaf.shape[:stacked]), tuple(leaf.shape[stacked:split]), tuple(leaf.shape[split:]))
    return found


def add(params: Any, targets: Sequence[str], rank: int = 8, alpha: float = 16.0, rng: Array | None = None, dropout: float = 0.0) -> dict:
    """Returns `params` with an adapter on every `Linear` that a target matches.

    A is uniform in +-1 / sqrt(rows), as PEFT draws it (Kaiming, a = sqrt(5)), B is 0. Both are float32, one a layer of a stack.

    Raises:
      ConfigError: for a target that matches no `Linear`, one that has an adapter already, or a rank above the smaller side of a kernel.
    """
    settings = read_lora(dict(targets=targets, rank=rank, alpha=alpha, dropout=dropout))
    rng = jax.random.key(0) if rng is None else rng
    shapes, added = linears(params), dict(flatten(params))
    for number, path in enumerate(matching(shapes, targets)):
        shape = shapes[path]
        if f"{path}/{LORA}/a" in added:
            raise ConfigError(f"lora.targets: {path} has an adapter already; merge it first, or leave it out.")
        if rank > min(shape.rows, shape.columns):
            raise ConfigError(f"lora.rank is {rank}, but {path} is a kernel of {shape.rows} x {shape.columns}; choose a rank of at most "
                              f"{min(shape.rows, shape.columns)}.")
        leaves = _fresh(settings, shape, jax.random.fold_in(rng, number))
        added.update({f"{path}/{LORA}/{name}": leaf for name, leaf in leaves.items()})
    return unflatten(added)


def _fresh(settings: LoraSettings, shape: LinearShape, key: Array) -> dict[str, Array]:
    bound = 1.0 / math.sqrt(shape.rows)
    leaves = {"a": jax.random.uniform(key, (*shape.layers, shape.rows, settings.rank), jnp.float32, -bound, bound),
              "b": jnp.zeros((*shape.layers, settings.rank, shape.columns), jnp.float32)}
    return {**leaves, **_constants(settings, shape)}


def _constants(settings: LoraSettings, shape: LinearShape) -> dict[str, Array]:
    constants = {"scaling": jnp.full(shape.layers, settings.alpha / settings.rank, jnp.float32)}
    if settings.dropout:
        constants["dropout"] = jnp.full(shape.layers, settings.dropout, jnp.float32)
    return constants


def merge(params: Any) -> dict:
    """Returns plain parameters with every adapter added to its kernel, W + scaling A B, computed in float32 and rounded to the kernel's dtype; an int8 kernel
    below an adapter becomes float32. Without adapters the tree is returned as it is."""
    table = dict(flatten(params))
    shapes = linears(params)
    for path in adapted(params):
        a, b, scaling = (table.pop(f"{path}/{LORA}/{name}").astype(jnp.float32) for name in ("a", "b", "scaling"))
        table.pop(f"{path}/{LORA}/dropout", None)
        kernel, scale = table[f"{path}/kernel"], table.pop(f"{path}/{SCALE}", None)
        dtype = kernel.dtype if scale is None else jnp.float32
        base = kernel.astype(jnp.float32) if scale is None else _dequantized(kernel, scale, shapes[path])
        update = scaling[..., None, None] * jnp.matmul(a, b, precision="highest")
        table[f"{path}/kernel"] = _placed((base + update.reshape(kernel.shape)).astype(dtype), kernel)
    return unflatten(table)


def strip(params: Any) -> dict:
    """Returns `params` without adapters: the base, bit for bit."""
    return unflatten({path: leaf for path, leaf in flatten(params).items() if f"/{LORA}/" not in path})


def adapted(params: Any) -> list[str]:
    """Returns the paths of the `Linear`s that have an adapter."""
    end = f"/{LORA}/a"
    return [path.removesuffix(end) for path in flatten(params) if path.endswith(end)]


def quantized(params: Any) -> list[str]:
    """Returns the paths of the `Linear`s whose kernel is int8."""
    return [path.removesuffix("/kernel") for path, leaf in flatten(params).items() if path.endswith("/kernel") and leaf.dtype == jnp.int8]


def quantize(params: Any, targets: Sequence[str] = (".*",)) -> dict:
    """Returns `params` with the kernels of the matching `Linear`s in int8, each output column c of a layer as round(W[:, c] / scale[c]) with
    scale[c] = max |W[:, c]| / 127, float32. An entry is off by at most half its column's scale. Adapters and biases stay as they are.

    Raises:
      ConfigError: for a target that matches no `Linear`.
    """
    table, shapes = dict(flatten(params)), linears(params)
    for path in matching(shapes, targets, "targets"):
        kernel = table[f"{path}/kernel"]
        if kernel.dtype == jnp.int8:
            continue
        shape = shapes[path]
        matrix = kernel.astype(jnp.float32).reshape(*shape.layers, shape.rows, shape.columns)
        scale = jnp.max(jnp.abs(matrix), axis=-2, keepdims=True) / LEVELS
        whole = jnp.clip(jnp.round(matrix / jnp.where(scale > 0, scale, 1.0)), -LEVELS, LEVELS).astype(jnp.int8)
        table[f"{path}/kernel"] = _placed(whole.reshape(kernel.shape), kernel)
        table[f"{path}/{SCALE}"] = scale.reshape(*shape.layers, *shape.features)
    return unflatten(table)


def dequantize(params: Any, dtype: Any = jnp.float32) -> dict:
    """Returns `params` with int8 kernels as numbers of `dtype` and without their scales."""
    table, shapes = dict(flatten(params)), linears(params)
    for path in quantized(params):
        kernel = table[f"{path}/kernel"]
        table[f"{path}/kernel"] = _placed(_dequantized(kernel, table.pop(f"{path}/{SCALE}"), shapes[path]).astype(dtype), kernel)
    return unflatten(table)


def _placed(value: Any, kernel: Any) -> Any:
    """`value` on the devices as the kernel that it replaces, where that is spread over a mesh."""
    sharding = getattr(kernel, "sharding", None)
    return jax.device_put(value, sharding) if isinstance(sharding, jax.sharding.NamedSharding) and not isinstance(value, jax.core.Tracer) else value


def _dequantized(kernel: Array, scale: Array, shape: LinearShape) -> Array:
    wide = scale.reshape(*shape.layers, *(1,) * len(shape.inputs), *shape.features)
    return kernel.astype(jnp.float32) * wide.astype(jnp.float32)


def plain(params: Any) -> dict:
    """Returns parameters as the model initialises them: adapters merged, int8 kernels in float32."""
    return dequantize(merge(params))


def matching(shapes: Mapping[str, LinearShape], targets: Sequence[str], where: str = "lora.targets") -> list[str]:
    """Returns the paths that a target matches, in the order of the tree.

    Raises:
      ConfigError: for a target that is no regex or matches nothing.
    """
    patterns, chosen = _patterns(targets, where), set()
    for pattern in patterns:
        found = [path for path in shapes if pattern.fullmatch(path)]
        if not found:
            raise ConfigError(f'{where}: "{pattern.pattern}" matches no Linear.{did_you_mean(pattern.pattern, shapes)[:300]} '
                              'A regex must match the whole path, as in ".*/attention/(query|value)".')
        chosen.update(found)
    return [path for path in shapes if path in chosen]


def _patterns(targets: Sequence[str], where: str) -> list[re.Pattern]:
    if isinstance(targets, str) or not isinstance(targets, (list, tuple)) or not targets or not all(isinstance(item, str) for item in targets):
        raise ConfigError(f'{where} is {targets!r}; give a list of regexes such as [".*/attention/(query|value)"].')
    try:
        return [re.compile(target) for target in targets]
    except re.error as error:
        raise ConfigError(f"{where}: a target is not a regular expression ({error}); correct it.") from None


def initializer(init: Callable[[Array], Any], lora: Mapping[str, Any] | None) -> Callable[[Array], Any]:
    """Returns `init` (rng -> params) of a stage: with its adapters added."""
    if lora is None:
        return init
    return lambda rng: add(init(rng), rng=jax.random.fold_in(rng, 1), **lora)


def fitted(params: Any, lora: Mapping[str, Any] | None, rng: Array) -> Any:
    """Returns `params`, handed over by another stage or run, as a stage with the setting `lora` begins with them.

    Adapters of the same targets and rank go on as they are, with this stage's alpha and dropout; others are merged first, and fresh ones added.
    """
    present = adapted(params)
    if lora is None:
        return merge(params) if present else params
    settings, shapes, table = read_lora(lora), linears(params), dict(flatten(params))
    wanted = matching(shapes, settings.targets)
    if present != wanted or any(table[f"{path}/{LORA}/a"].shape[-1] != settings.rank for path in present):
        return add(merge(params) if present else params, rng=rng, **lora)
    for path in present:
        table.pop(f"{path}/{LORA}/dropout", None)
        table.update({f"{path}/{LORA}/{name}": leaf for name, leaf in _constants(settings, shapes[path]).items()})
    return unflatten(table)


def counts(params: Any) -> dict[str, int]:
    """Returns {"base": parameters without adapters, "adapters": entries of A and B, "int8": entries of int8 kernels, "bytes": of everything}."""
    table = flatten(params)
    sizes = {path: math.prod(leaf.shape) for path, leaf in table.items()}
    inside = {path for path in table if f"/{LORA}/" in path}
    return {"base": sum(size for path, size in sizes.items() if path not in inside and not _scale_of_int8(path, table)),
            "adapters": sum(sizes[path] for path in inside if path.rsplit("/", 1)[-1] in ("a", "b")),
            "int8": sum(size for path, size in sizes.items() if table[path].dtype == jnp.int8),
            "bytes": sum(size * np.dtype(table[path].dtype).itemsize for path, size in sizes.items())}


def _scale_of_int8(path: str, table: Mapping[str, Any]) -> bool:
    module, _, name = path.rpartition("/")
    kernel = table.get(f"{module}/kernel")
    return name == SCALE and kernel is not None and kernel.dtype == jnp.int8
