"""Learning-rate schedules: step -> learning rate, in steps of a stage, with linear warm-up from 0 and, where asked, linear cool-down to 0."""
from collections.abc import Callable, Mapping
import dataclasses
import inspect
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError
from vlm_jax.settings import call, choose


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the stage's step; `peak` is its largest value, from which relative decay is measured."""
    function: Callable[[Any], Float[Array, ""]]
    peak: float

    def __call__(self, step: Any) -> Float[Array, ""]:
        """Returns the learning rate of the step numbered `step`, from 0, as float32."""
        return self.function(step)


def cosine(steps: int, peak: float, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Warm-up to `peak`, then half a cosine down to `final * peak` at the last step (Loshchilov and Hutter, "SGDR", 2017, without restarts)."""
    def shape(step):
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return _schedule(shape, steps, peak, warmup, 0)


def linear(steps: int, peak: float, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Warm-up to `peak`, then a straight line to `final * peak` at the last step."""
    def shape(step):
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        return 1 - (1 - final) * progress
    return _schedule(shape, steps, peak, warmup, 0)


def rsqrt(steps: int, peak: float, warmup: int = 0, timescale: int = 10_000, cooldown: int = 0) -> Schedule:
    """Warm-up to `peak`, then `peak / sqrt(1 + (step - warmup) / timescale)`; the last `cooldown` steps go linearly to 0.

    Zhai et al., "Scaling Vision Transformers" (2022), section 3.5: apart from warm-up and cool-down it does not depend on `steps`, so a run can be
    prolonged.
    """
    if timescale <= 0:
        raise ConfigError(f"schedule.timescale is {timescale}; it must be positive.")
    return _schedule(lambda step: 1 / jnp.sqrt(1 + jnp.maximum(step - warmup, 0) / timescale), steps, peak, warmup, cooldown)


def constant(steps: int, peak: float, warmup: int = 0, cooldown: int = 0) -> Schedule:
    """Warm-up to `peak`, which stays; the last `cooldown` steps go linearly to 0."""
    return _schedule(lambda step: jnp.ones_like(step), steps, peak, warmup, cooldown)


SCHEDULES: dict[str, Callable[..., Schedule]] = {"cosine": cosine, "linear": linear, "rsqrt": rsqrt, "constant": constant}


def build_schedule(settings: Mapping[str, Any], steps: int, where: str = "schedule") -> Schedule:
    """Builds the schedule that `settings["name"]` names for a stage of `steps` steps.

    Raises:
      ConfigError: for an unknown name or setting, a peak that is not positive, warm-up and cool-down that do not fit into the steps.
    """
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise ConfigError(f"{where}.name is missing; choose one of {', '.join(sorted(SCHEDULES))}.")
    settings = dict(settings)
    function = choose(SCHEDULES, settings.pop("name"), f"{where}.name")
    known = inspect.signature(function).parameters
    for key, value in settings.items():
        if key in known and key != "steps" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{where}.{key} is {value!r}; it must be a number.")
    if settings.get("peak", 1.0) <= 0:
        raise ConfigError(f"{where}.peak is {settings['peak']!r}; the learning rate must be positive.")
    for key in ("warmup", "cooldown"):
        if settings.get(key, 0) < 0:
            raise ConfigError(f"{where}.{key} is {settings[key]!r}; it must be at least 0.")
    warmup, cooldown = (settings.get(key, 0) if key in known else 0 for key in ("warmup", "cooldown"))
    if warmup + cooldown > steps:
        parts = f"warmup={warmup}" + (f" and cooldown={cooldown}" if cooldown else "")
        raise ConfigError(f"{where}: {parts} do not fit into steps={steps}; shorten {'them' if cooldown else 'the warm-up'} or train longer.")
    return call(function, settings, where, steps=steps)


def _schedule(shape: Callable, steps: int, peak: float, warmup: int, cooldown: int) -> Schedule:
    def function(step):
        step = jnp.asarray(step, jnp.float32)
        rate = peak * shape(step)
        if warmup:
            rate = rate * jnp.minimum(1.0, step / warmup)
        if cooldown:
            rate = rate * jnp.clip((steps - step) / cooldown, 0.0, 1.0)
        return rate
    return Schedule(function, float(peak))
