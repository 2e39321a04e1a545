"""Biases of attention logits that depend on the distance of query and key: ALiBi and T5's relative position buckets."""
import functools
import math

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.errors import ConfigError

KEYS_AT_ONCE = 128   # of which the gradient of a table is summed


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


@struct.dataclass
class RelativeBias:
    """T5's learned bias of logits, as what it is made of: attention in blocks of keys never holds it for all keys.

    Attributes:
      table: the bias of each bucket and head.
      query_position, key_position: see `relative_buckets`.
      max_distance, bidirectional: see `relative_buckets`.
    """
    table: Float[Array, "N H"]
    query_position: Int[Array, "B T"]
    key_position: Int[Array, "B S"]
    max_distance: int = struct.field(pytree_node=False, default=128)
    bidirectional: bool = struct.field(pytree_node=False, default=True)

    def buckets(self) -> Int[Array, "B T S"]:
        """The bucket of each pair."""
        return relative_buckets(self.query_position, self.key_position, buckets=self.table.shape[0], max_distance=self.max_distance,
                                bidirectional=self.bidirectional)

    def dense(self) -> Float[Array, "B H T S"]:
        """The bias of each pair and head."""
        return look_up(self.table, self.buckets())

    def of_keys(self, start: Int[Array, ""] | int, size: int) -> "RelativeBias":
        """The bias of `size` keys from `start` on."""
        return self.replace(key_position=lax.dynamic_slice_in_dim(self.key_position, start, size, 1))

    def gradient(self, of_dense: Float[Array, "B H T S"]) -> Float[Array, "N H"]:
        """The gradient of the table, float32, from that of `dense()`."""
        return _table_gradient(self.buckets(), of_dense, self.table.shape[0])


@jax.custom_vjp
def look_up(table: Float[Array, "N H"], buckets: Int[Array, "B T S"]) -> Float[Array, "B H T S"]:
    """The entry of each pair's bucket, for every head."""
    return jnp.moveaxis(table[buckets], -1, 1)


def _table_gradient(buckets: Int[Array, "B T S"], gradient: Float[Array, "B H T S"], entries: int) -> Float[Array, "N H"]:
    """Sums the gradient of each bucket's pairs, `KEYS_AT_ONCE` keys at a time: the axis of keys is the one that no mesh splits."""
    keys = buckets.shape[-1]
    size = min(KEYS_AT_ONCE, keys)

    def of_keys(total, number):
        start = jnp.minimum(number * size, keys - size)     # the last keys overlap with those before, which count once
        new = start + jnp.arange(size) >= number * size
        bucket = jnp.where(new, lax.dynamic_slice_in_dim(buckets, start, size, 2), -1)
        # A product with indicators: adding pairs one by one into the few rows of the table is slow everywhere.
        chosen = jax.nn.one_hot(bucket, entries, dtype=jnp.float32)
        part = lax.dynamic_slice_in_dim(gradient, start, size, 3).astype(jnp.float32)
        return total + jnp.einsum("btsn,bhts->nh", chosen, part), None

    return lax.scan(of_keys, jnp.zeros((entries, gradient.shape[1]), jnp.float32), jnp.arange(-(-keys // size)))[0]


def _look_up_backward(saved, gradient):
    buckets, table = saved
    return _table_gradient(buckets, gradient, table.shape[0]).astype(table.dtype), None


look_up.defvjp(lambda table, buckets: (look_up(table, buckets), (buckets, table)), _look_up_backward)
