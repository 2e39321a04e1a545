"""Initialisers by name, so that a config or a preset can state them."""
from collections.abc import Callable

from flax import linen as nn

from vlm_jax.settings import choose

# variance_scaling(1/3, fan_in, uniform) is U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch.nn.Linear starts from.
INITIALIZERS: dict[str, Callable] = {
    "zeros": nn.initializers.zeros,
    "ones": nn.initializers.ones,
    "xavier_uniform": nn.initializers.xavier_uniform(),
    "lecun_normal": nn.initializers.lecun_normal(),
    "torch_uniform": nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform"),
}


def initializer(spec: str | float) -> Callable:
    """Returns the initialiser `(key, shape, dtype) -> array` named by `spec`; a number is the standard deviation of a normal distribution.

    Raises:
      ConfigError: for a name that is not in `INITIALIZERS`.
    """
    if isinstance(spec, (int, float)):
        return nn.initializers.normal(float(spec))
    return choose(INITIALIZERS, spec, "initializer")
