"""Dropout of activations and of patches. Both draw from the `dropout` random stream, and only in training."""
from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError


class Dropout(nn.Module):
    """Zeroes each element with probability `rate` and divides the others by 1 - rate (Srivastava et al. 2014); the identity outside training."""
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "..."], train: bool = False) -> Float[Array, "..."]:
        if not 0.0 <= self.rate < 1.0:
            raise ConfigError(f"dropout: the rate is {self.rate}; choose one from 0 up to, but not including, 1.")
        if not train or self.rate == 0.0:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class PatchDropout(nn.Module):
    """Keeps a random subset of the tokens of each example, in their order.

    Li et al., "Scaling Language-Image Pre-training via Masking" (2023), section 3.

    Attributes:
      rate: the share of tokens to drop; round((1 - rate) N) of N are kept, at least one.
      keep_first: the number of leading tokens (a class token) that always stay.
    """
    rate: float = 0.0
    keep_first: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], train: bool = False) -> Float[Array, "B M D"]:
        if not 0.0 <= self.rate < 1.0:
            raise ConfigError(f"patch_dropout: the rate is {self.rate}; choose one from 0 up to, but not including, 1.")
        if not train or self.rate == 0.0:
            return x
        first, rest = x[:, :self.keep_first], x[:, self.keep_first:]
        count = max(1, round((1.0 - self.rate) * rest.shape[1]))
        order = jnp.argsort(jax.random.uniform(self.make_rng("dropout"), rest.shape[:2]), axis=1)
        kept = jnp.sort(order[:, :count], axis=1)
        return jnp.concatenate([first, jnp.take_along_axis(rest, kept[:, :, None], axis=1)], axis=1)
