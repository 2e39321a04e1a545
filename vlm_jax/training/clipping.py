"""Clipping of gradients: by the norm of all together, and unit by unit in proportion to the weights.

Adaptive clipping: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (2021), section 4.1. For the weights W of one output
unit and their gradient G, where |G| > limit max(|W|, eps), G is scaled down to that length. A unit is what gives one number of a layer's output: a column of a
matrix, a filter of a convolution. Vectors (biases, gains, scales) and scalars are one unit each. In a stack every layer has its own units.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.nn.linear import input_axes
from vlm_jax.settings import call
from vlm_jax.training.gradients import clip_by_global_norm, global_norm
from vlm_jax.training.trees import flatten, is_stacked, unflatten, virtual_paths

VECTORS = ("bias", "scale", "gain")   # one unit, however many axes (the bias of a projection to heads has two)
LEAST_NORM = 1e-6                     # of a gradient, where it is divided by


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Settings of adaptive clipping: the largest |G| over |W|, and the least |W| that counts."""
    limit: float = 0.01
    eps: float = 1e-3


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """What a stage's `clip` says.

    Attributes:
      norm: the largest global norm of the gradients that are not clipped adaptively; None does not clip them.
      adaptive: ordered (regex, `Adaptive` or None) over parameter paths, the first that matches wins; what none matches is not clipped adaptively.
    """
    norm: float | None = None
    adaptive: tuple[tuple[re.Pattern, Adaptive | None], ...] = ()


def read_clip(clip: float | Mapping[str, Any] | None, where: str = "clip") -> ClipSettings:
    """Returns the checked settings of `clip`: a number (the global norm), None, or
    {"norm": number or None, "adaptive": [[regex, {"limit", "eps"} or None], ...]}.

    Raises:
      ConfigError: for another key or kind of value, or a regex that is none.
    """
    if clip is None or not isinstance(clip, Mapping):
        return _settings(clip, (), where, f"{where} is {clip!r}")

    def clipping(norm: float | None = None, adaptive: Sequence = ()) -> ClipSettings:
        return _settings(norm, adaptive, where, f"{where}.norm is {norm!r}")
    return call(clipping, clip, where)


def _settings(norm: Any, adaptive: Sequence[Sequence[Any]], where: str, found: str) -> ClipSettings:
    if norm is not None and not _positive(norm):
        raise ConfigError(f"{found}; it must be a positive number, or None.")
    if not isinstance(adaptive, (list, tuple)):
        raise ConfigError(f'{where}.adaptive is {adaptive!r}; write a list of [regex, settings or None], as in [["head/kernel", None], [".*", {{}}]].')
    rules = []
    for number, rule in enumerate(adaptive):
        here = f"{where}.adaptive[{number}]"
        if not isinstance(rule, (list, tuple)) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ConfigError(f"{here} is {rule!r}; write [regex, settings], with None for what is not clipped so.")
        pattern, settings = rule
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f'{here}: "{pattern}" is not a regular expression ({error}); correct it.') from None
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f'{here}: the settings are {settings!r}; write a mapping such as {{"limit": 0.01}}, or None.')
        values = None if settings is None else call(Adaptive, settings, here)
        for name, value in (dataclasses.asdict(values) if values else {}).items():
            if not _positive(value):
                raise ConfigError(f"{here}.{name} is {value!r}; it must be a positive number.")
        rules.append((compiled, values))
    return ClipSettings(norm, tuple(rules))


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


class Clip:
    """The settings of a stage applied to the parameters of a model.

    Args:
      settings: see `read_clip`.
      shapes: {path: shape} of all parameters.
    Raises:
      ConfigError: as `read_clip`; for a rule that matches no parameter, or that tells layers of one stack apart.
    """

    def __init__(self, settings: float | Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], where: str = "clip"):
        read = read_clip(settings, where)
        self.norm = read.norm
        self.adaptive: dict[str, tuple[Adaptive, tuple[int, ...]]] = {}   # path -> settings, and the axes over which one unit reaches
        matched, every_path = set(), []
        for path, shape in shapes.items():
            virtual = virtual_paths(path, shape)
            every_path.extend(virtual)
            matching = [[number for number, (pattern, _) in enumerate(read.adaptive) if pattern.fullmatch(name)] for name in virtual]
            matched.update(*matching)
            winners = {numbers[0] if numbers else None for numbers in matching}
            if len(winners) > 1:
                raise ConfigError(f"{where}.adaptive: the layers of {path} are clipped by different rules; let one regex match all of them.")
            winner = winners.pop() if winners else None
            if winner is not None and read.adaptive[winner][1] is not None:
                self.adaptive[path] = read.adaptive[winner][1], unit_axes(path, shapes)
        for number, (pattern, _) in enumerate(read.adaptive):
            if number not in matched:
                raise ConfigError(f'{where}.adaptive[{number}]: "{pattern.pattern}" matches no parameter.{did_you_mean(pattern.pattern, every_path)[:300]} '
                                  'A regex must match the whole path, as in "image/.*".')

    def __call__(self, gradients: Any, params: Any) -> tuple[Any, Float[Array, ""]]:
        """Returns (clipped gradients, the global norm of all of them before).

        Args:
          gradients, params: of the trained parameters, float32.
        """
        table, weights = flatten(gradients), flatten(params)
        own = {path: clip_units(gradient, weights[path], *self.adaptive[path]) for path, gradient in table.items() if path in self.adaptive}
        if not own:
            return clip_by_global_norm(gradients, self.norm)
        together, _ = clip_by_global_norm({path: gradient for path, gradient in table.items() if path not in own}, self.norm)
        return unflatten({path: own[path] if path in own else together[path] for path in table}), global_norm(gradients)


def unit_axes(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The axes of a parameter over which one output unit reaches: the inputs of a kernel, the rows of any other table, all axes of a vector."""
    shape, first = shapes[path], int(is_stacked(path))
    module, _, name = path.rpartition("/")
    axes = len(shape) - first
    if name in VECTORS or sum(size > 1 for size in shape[first:]) < 2:
        inputs = axes
    elif name == "kernel":
        bias = shapes.get(f"{module}/bias")
        inputs = input_axes(module, axes, None if bias is None else len(bias) - first)
    else:
        inputs = axes - 1
    return tuple(range(first, first + inputs))


def clip_units(gradient: Float[Array, "..."], weight: Float[Array, "..."], settings: Adaptive, axes: tuple[int, ...]) -> Float[Array, "..."]:
    """The gradient with each unit, which reaches over `axes`, scaled down to a length of at most limit max(|W|, eps)."""
    def length(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(axes, keepdims=True))
    bound, found = settings.limit * jnp.maximum(length(weight), settings.eps), length(gradient)
    return (gradient * jnp.where(found > bound, bound / jnp.maximum(found, LEAST_NORM), 1.0)).astype(gradient.dtype)
