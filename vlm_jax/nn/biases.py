"""Biases of attention logits that depend on the distance of query and key: ALiBi and T5's relative position buckets."""
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.errors import ConfigError


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> np.ndarray:
    """The slopes [H] of ALiBi, 2^(-max_bias h / n) for h = 1..n, of which n = the next power of two.

    Press et al., "Train Short, Test Long" (2022). Where the number of heads is not n, MPT's rule: every second slope, from the second on, then those
    between, as many as there are heads.
    """
    if num_heads < 1:
        raise ConfigError(f"alibi: {num_heads} heads; choose a positive number.")
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = np.float32(2.0) ** (-np.arange(1, power + 1, dtype=np.float32) * np.float32(max_bias / power))
    return slopes if power == num_heads else np.concatenate([slopes[1::2], slopes[::2]])[:num_heads]


def alibi(slopes: Float[Array, "H"], key_position: Int[Array, "B S"]) -> Float[Array, "B H 1 S"]:
    """slope * position of the key: up to a constant of the query, which the softmax does not see, minus slope times distance. It is counted from the last
    key, so that it stays small near it; empty slots (-1) are read by nobody."""
    last = key_position.max(1, keepdims=True)
    distance = jnp.where(key_position < 0, 0, key_position - last).astype(jnp.float32)
    return jnp.asarray(slopes, jnp.float32)[None, :, None, None] * distance[:, None, None, :]


def relative_buckets(query_position: Int[Array, "B T"], key_position: Int[Array, "B S"], *, buckets: int = 32, max_distance: int = 128,
                     bidirectional: bool = True) -> Int[Array, "B T S"]:
    """T5's bucket of each pair: exact for near keys, logarithmically wider up to `max_distance`, the last one for all beyond.

    Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 2.1.

    Args:
      bidirectional: half of the buckets are for keys after the query; otherwise those share the bucket of distance 0.
    Raises:
      ConfigError: if there are too few buckets, or `max_distance` is not beyond the exact ones.
    """
    bounds = _bounds(buckets // 2 if bidirectional else buckets, max_distance)
    relative = key_position[:, None, :] - query_position[:, :, None]
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    bucket = sum((distance >= int(bound)).astype(jnp.int32) for bound in bounds)
    return bucket + jnp.where(relative > 0, buckets // 2, 0) if bidirectional else bucket


@functools.lru_cache
def _bounds(buckets: int, max_distance: int) -> np.ndarray:
    """The smallest distance of each bucket but the first. Comparing distances is exact everywhere; a logarithm is rounded differently by every backend."""
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ConfigError(f"relative: {buckets} buckets a direction with max_distance={max_distance}; choose at least 2 and a max_distance above {exact}.")
    distance = np.arange(1, max_distance + 1, dtype=np.float32)
    far = exact + (np.log(distance / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance.astype(np.int64), np.minimum(far, buckets - 1))
    # Where few buckets lie far apart some are never used: they begin with the next one that is.
    return 1 + np.searchsorted(bucket, np.arange(1, buckets), side="left")


def relative_bias(table: Float[Array, "N H"], buckets: Int[Array, "B T S"]) -> Float[Array, "B H T S"]:
    """The learned bias of each pair's bucket, for every head."""
    return _look_up(table, buckets)


@jax.custom_vjp
def _look_up(table, buckets):
    return jnp.moveaxis(table[buckets], -1, 1)


def _look_up_backward(saved, gradient):
    buckets, table = saved

    def of_row(total, row):
        # A product with indicators: adding T S rows one by one into the few of the table is slow everywhere.
        chosen = jax.nn.one_hot(row[0], table.shape[0], dtype=jnp.float32)
        return total + jnp.einsum("tsn,hts->nh", chosen, row[1].astype(jnp.float32)), None

    total, _ = lax.scan(of_row, jnp.zeros(table.shape, jnp.float32), (buckets, gradient))
    return total.astype(table.dtype), None


_look_up.defvjp(lambda table, buckets: (_look_up(table, buckets), (buckets, table)), _look_up_backward)
