"""Digests of arrays that do not depend on how the arrays are laid out over devices.

Every element is bitcast to unsigned words; each word is mixed with its flat index in the global array; the mixtures are summed with
wrap-around. A sum does not care in which order or on which device it is taken, so the digest of an array is the same on every mesh,
while one flipped bit or two exchanged elements change it. It runs under jit where the array lives: nothing is gathered.
"""
from collections.abc import Mapping, Sequence
import functools
import hashlib
import json
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from vlm_jax.settings import plain

_LOW_16 = np.uint32(0xFFFF)
# Odd constants: products with them are bijections modulo 2^32. The values are arbitrary, but stored digests depend on them.
_POSITION_LOW, _POSITION_HIGH, _SEED, _MULTIPLY_1, _MULTIPLY_2 = (
    np.uint32(c) for c in (0x9E3779B1, 0xC2B2AE3D, 0x27D4EB2F, 0x7FEB352D, 0x846CA68B))


def digest(leaf: Any) -> str:
    """Returns 16 hexadecimal characters that identify the contents of one array (any shape and dtype, sharded or not).

    Dtypes are JAX's: Python scalars and 64-bit numpy arrays count as what `jnp.asarray` makes of them.
    """
    return digests({"": leaf})[""]


def digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Digests of several arrays, dispatched together so that devices work while others wait; keys are kept."""
    lanes = {name: _device_digest(leaf) for name, leaf in leaves.items()}
    return {name: "".join(f"{int(word):08x}" for word in np.asarray(pair)) for name, pair in lanes.items()}


def checksum(metadata: Any) -> str:
    """SHA-256 of `metadata` as canonical JSON: sorted keys, no spaces."""
    text = json.dumps(plain(metadata), sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def flat_index(coordinates: Sequence[jax.Array], shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The flat row-major index of elements of an array of `shape`, as two uint32 words (low, high), exact for up to 2^64 elements.

    Args:
      coordinates: one uint32 array per axis of `shape`, broadcastable against each other.
      shape: the global shape; arrays of fewer than 2^32 elements take a shorter way to the same result.
    """
    low = high = jnp.zeros((), jnp.uint32)
    if math.prod(shape) < 2**32:
        for coordinate, size in zip(coordinates, shape, strict=True):
            low = low * np.uint32(size) + coordinate
        return low, high
    for coordinate, size in zip(coordinates, shape, strict=True):
        carry, product = _multiply(low, np.uint32(size))
        high = high * np.uint32(size) + carry
        low = product + coordinate
        high = high + (low < product).astype(jnp.uint32)
    return low, high


def _device_digest(leaf: Any) -> jax.Array:
    leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, jax.sharding.NamedSharding) else None
    return _compiled(mesh)(leaf)


@functools.lru_cache(maxsize=16)
def _compiled(mesh: jax.sharding.Mesh | None):
    # Replicated, so that every process of a pod can read the result.
    replicated = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(_lanes, out_shardings=replicated)


def _lanes(x: jax.Array) -> jax.Array:
    """Two independent 32-bit sums over the words of x: [2] uint32."""
    words = _words(x)
    low, high = flat_index([lax.broadcasted_iota(jnp.uint32, words.shape, axis) for axis in range(words.ndim)], words.shape)
    position = _mix(low * _POSITION_LOW + high * _POSITION_HIGH + _SEED)
    mixed = _mix(words ^ position)      # a bijection of the word at a fixed position: one changed element always shows
    weighted = mixed * (position | np.uint32(1))
    # One reduction of the pair: XLA's CPU backend runs it many times faster than two sums.
    zero = np.uint32(0)
    return jnp.stack(lax.reduce((mixed, weighted), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), range(words.ndim)))


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32, with an extra trailing axis where an element has more than 32."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo(x.dtype).bits
    if bits == 64:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every input bit reaches every output bit: shifts and odd multiplications."""
    h = h ^ (h >> np.uint32(16))
    h = h * _MULTIPLY_1
    h = h ^ (h >> np.uint32(15))
    h = h * _MULTIPLY_2
    return h ^ (h >> np.uint32(16))


def _multiply(a: jax.Array, b: np.uint32) -> tuple[jax.Array, jax.Array]:
    """The 64-bit product of two 32-bit words as (high, low): 64-bit integers are not there under jit by default."""
    a_low, a_high = a & _LOW_16, a >> np.uint32(16)
    b_low, b_high = b & _LOW_16, b >> np.uint32(16)
    low, middle_1, middle_2 = a_low * b_low, a_low * b_high, a_high * b_low
    middle = (low >> np.uint32(16)) + (middle_1 & _LOW_16) + (middle_2 & _LOW_16)
    high = a_high * b_high + (middle_1 >> np.uint32(16)) + (middle_2 >> np.uint32(16)) + (middle >> np.uint32(16))
    return high, (middle << np.uint32(16)) | (low & _LOW_16)
