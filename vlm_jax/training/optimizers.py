"""Optimisers built on Optax, with the stage's rules: learning-rate factors, weight decay, frozen parameters and frozen layers of a stack.

Weight decay is decoupled from the gradient's statistics in all of them. What it is multiplied by is `decay_by`:

    "learning_rate"   parameter -= lr(step) * weight_decay * parameter             as in AdamW of Optax and PyTorch (CLIP's 0.2)
    "schedule"        parameter -= lr(step) / peak * weight_decay * parameter      as in big_vision (SigLIP's 1e-4), whatever the peak

A rule's `lr` factor multiplies the first kind of decay, and does not touch the second; its `weight_decay` factor multiplies both.

What an optimiser remembers may be kept in bfloat16, half the bytes: `momentum_dtype` of all of them and `second_moment_dtype` of AdamW. The means of
AdamW and Lion, which move by a hundredth or a thousandth a step, are rounded stochastically (`rounding.py`); the momenta of Adafactor and SGD, which move by a
tenth, to the nearest, as in big_vision. Every step is computed in float32.
"""
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.errors import ConfigError
from vlm_jax.settings import call, choose
from vlm_jax.training.clipping import Clip
from vlm_jax.training.factored import scale_by_factored_rms
from vlm_jax.training.rounding import kept_in
from vlm_jax.training.schedules import Schedule, build_schedule
from vlm_jax.training.stages import Rules
from vlm_jax.training.trees import flatten, is_adapter, is_stacked, unflatten

NEVER_DECAYED = ("bias", "scale")
DECAY_BY = ("learning_rate", "schedule")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Method:
    """An update rule before learning rate and decay: a direction from gradients, and how weights decay."""
    direction: optax.GradientTransformation
    weight_decay: float
    decay_by: str
    decay_embeddings: bool


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, decay_by: str = "learning_rate",
          decay_embeddings: bool = False, momentum_dtype: str = "float32", second_moment_dtype: str = "float32") -> Method:
    """AdamW. Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2."""
    direction = kept_in(optax.scale_by_adam(b1, b2, eps), {"mu": _dtype(momentum_dtype), "nu": _dtype(second_moment_dtype)})
    return Method(direction, weight_decay, decay_by, decay_embeddings)


def adafactor(b1: float | None = 0.9, decay_rate: float = 0.8, decay_cap: float = 0.999, eps: float = 1e-30, min_dim_factored: int = 32,
              clip_threshold: float | None = None, momentum_dtype: str = "bfloat16", weight_decay: float = 0.0, decay_by: str = "schedule",
              decay_embeddings: bool = False) -> Method:
    """The Adafactor of Zhai et al., "Scaling Vision Transformers" (2022), section 3.4, with big_vision's constants.

    The second moment is factored, with decay min(decay_cap, 1 - t^-decay_rate); a momentum in bfloat16 follows the division by it (b1=None: none);
    the step is not relative to the parameter's size. `clip_threshold` bounds the root mean square of each parameter's update (off in big_vision).
    """
    parts = [scale_by_factored_rms(decay_rate, decay_cap, eps, min_dim_factored, clip_threshold)]
    if b1:
        parts.append(optax.ema(b1, debias=False, accumulator_dtype=_dtype(momentum_dtype)))
    return Method(optax.chain(*parts), weight_decay, decay_by, decay_embeddings)


def lion(b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0, decay_by: str = "learning_rate", decay_embeddings: bool = False,
         momentum_dtype: str = "float32") -> Method:
    """Lion: the sign of an interpolated momentum. Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), algorithm 2."""
    return Method(kept_in(optax.scale_by_lion(b1, b2), {"mu": _dtype(momentum_dtype)}), weight_decay, decay_by, decay_embeddings)


def sgd(momentum: float | None = 0.9, nesterov: bool = False, weight_decay: float = 0.0, decay_by: str = "learning_rate",
        decay_embeddings: bool = False, momentum_dtype: str = "float32") -> Method:
    """Stochastic gradient descent with (Nesterov) momentum; momentum=None is plain."""
    direction = optax.trace(momentum, nesterov, accumulator_dtype=_dtype(momentum_dtype)) if momentum else optax.identity()
    return Method(direction, weight_decay, decay_by, decay_embeddings)


OPTIMIZERS: dict[str, Callable[..., Method]] = {"adamw": adamw, "adafactor": adafactor, "lion": lion, "sgd": sgd}


def check_settings(settings: Mapping[str, Any], where: str = "optimizer") -> Method:
    """Returns the method that `settings["name"]` names.

    Raises:
      ConfigError: for an unknown name or setting, or a value out of range.
    """
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise ConfigError(f"{where}.name is missing; choose one of {', '.join(sorted(OPTIMIZERS))}.")
    settings = dict(settings)
    function = choose(OPTIMIZERS, settings.pop("name"), f"{where}.name")
    for key in ("b1", "b2", "decay_cap", "momentum"):
        value = settings.get(key)
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ConfigError(f"{where}.{key} is {value!r}; it must be at least 0 and below 1.")
    decay = settings.get("weight_decay", 0.0)
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or decay < 0:
        raise ConfigError(f"{where}.weight_decay is {decay!r}; it must be a number of at least 0.")
    for key, choices in (("decay_by", DECAY_BY), ("momentum_dtype", DTYPES), ("second_moment_dtype", DTYPES)):
        if key in settings:
            choose(dict.fromkeys(choices), settings[key], f"{where}.{key}")
    return call(function, settings, where)


def decays(path: str, ndim: int, embeddings: bool = False) -> bool:
    """Returns whether weight decay applies to a parameter: kernels and the matrices of adapters always, biases and norm scales never, tables
    of embeddings if asked.

    `ndim` counts the axes of one layer. Scalars and vectors (temperatures, class tokens) never decay.
    """
    name = path.rsplit("/", 1)[-1]
    if name == "kernel" or (is_adapter(path) and name in ("a", "b")):
        return True
    return embeddings and ndim >= 2 and name not in NEVER_DECAYED


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Updates parameters as one stage's settings and rules say; made by `build_optimizer`."""
    method: Method
    schedule: Schedule
    rules: Rules
    clip: Clip

    def init(self, params: Any) -> Any:
        """Returns the optimiser's state, computed in float32 whatever the parameters are; parameters that are wholly frozen have none."""
        return self.method.direction.init(_exact(self.rules.trained(params)))

    def update(self, gradients: Any, state: Any, params: Any, step: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
        """Takes one step.

        Args:
          gradients: of all parameters, or of those that are trained.
          step: the number of the step in its stage, from 0, for the schedule.
        Returns:
          (params, state, {"gradient_norm", "learning_rate"}): frozen parameters and frozen layers are returned bit for bit; the
          norm is that of the trained parameters before clipping.
        """
        trained = self.rules.trained(params)
        exact = _exact(trained)
        gradients, norm = self.clip(self.mask(_exact(self.rules.trained(gradients))), exact)
        directions, state = self.method.direction.update(gradients, state, exact)
        rate = self.schedule(step)
        flat_directions, moved = flatten(directions), dict(flatten(params))
        for path, value in flatten(trained).items():
            moved[path] = self._move(path, value, flat_directions[path], rate)
        return unflatten(moved), state, {"gradient_norm": norm, "learning_rate": rate}

    def mask(self, gradients: Any) -> Any:
        """Returns the gradients of trained parameters with zeros for the frozen layers of stacks."""
        masked = {path: gradient if self.rules.leaves[path].mask is None else jnp.where(self.rules.leaves[path].mask, gradient, 0)
                  for path, gradient in flatten(gradients).items()}
        return unflatten(masked)

    def _move(self, path: str, value: jax.Array, direction: jax.Array, rate: jax.Array) -> jax.Array:
        leaf = self.rules.leaves[path]
        exact = value.astype(jnp.float32)
        change = rate * leaf.lr * direction
        if self.method.weight_decay and decays(path, value.ndim - is_stacked(path), self.method.decay_embeddings):
            by = rate * leaf.lr if self.method.decay_by == "learning_rate" else rate / self.schedule.peak
            change = change + by * self.method.weight_decay * leaf.weight_decay * exact
        new = (exact - change).astype(value.dtype)
        return new if leaf.mask is None else jnp.where(leaf.mask, new, value)


def build_optimizer(settings: Mapping[str, Any], schedule: Mapping[str, Any], steps: int, rules: Rules, *,
                    clip: float | Mapping[str, Any] | None = None, where: str = "stage") -> Optimizer:
    """Builds the optimiser of a stage.

    Args:
      settings: `{"name": "adamw" | "adafactor" | "lion" | "sgd", ...}`, the keyword arguments of the function of that name here.
      schedule: the settings of `build_schedule`.
      steps: the steps of the stage.
      rules: which parameters move, and by what factors.
      clip: the largest global norm of the gradient, or settings of adaptive clipping; see `clipping.read_clip`.
    Raises:
      ConfigError: naming `where.optimizer.key`, `where.schedule.key` or `where.clip`.
    """
    return Optimizer(check_settings(settings, f"{where}.optimizer"), build_schedule(schedule, steps, f"{where}.schedule"), rules,
                     Clip(clip, rules.shapes, f"{where}.clip"))


def _exact(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _dtype(name: str) -> Any:
    return jnp.dtype(choose(dict(zip(DTYPES, DTYPES)), name, "momentum_dtype"))
