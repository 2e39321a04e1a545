"""Digests of arrays that do not depend on how the arrays are laid out over devices.

Every element is bitcast to unsigned words; each word is mixed with its flat index in the global array; the mixtures are summed with
wrap-around. A sum does not care in which order or on which device it is taken, so the digest of an array is the same on every mesh,
while one flipped bit or two exchanged elements change it. It runs under jit where the array lives: nothing is gathered; `host_digest`
computes the same from an array in host memory.
"""
from collections.abc import Iterator, Mapping, Sequence
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
    return finish(start(leaves))


def start(leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Dispatches the digests of several arrays and returns at once; `finish` gives them. The arrays may be donated in between."""
    leaves = {name: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for name, leaf in leaves.items()}
    lanes = {name: _program(leaf.shape, leaf.dtype, leaf.sharding)(leaf) for name, leaf in leaves.items()}
    # Simulated devices share a few threads: sums over them must not meet the collectives of the next step.
    if jax.default_backend() == "cpu" and any(leaf.sharding.num_devices > 1 for leaf in leaves.values()):
        jax.block_until_ready(lanes)
    return lanes


def finish(lanes: Mapping[str, jax.Array]) -> dict[str, str]:
    """The digests that `start` dispatched; waits for the devices. Any thread may call it."""
    return {name: "".join(f"{int(word):08x}" for word in np.asarray(pair)) for name, pair in lanes.items()}


def prepare(leaves: Mapping[str, Any]) -> None:
    """Compiles the digests of arrays or `jax.ShapeDtypeStruct`s with shardings, so that the first save need not; any thread may call it."""
    for leaf in leaves.values():
        _program(leaf.shape, leaf.dtype, leaf.sharding)


def host_digest(array: np.ndarray) -> str:
    """The digest of an array in host memory, by numpy in pieces that stay in the processor's cache: no device, no compilation, one thread.

    The dtype must be one that JAX has (`digest` makes it so). About 0.3 GB/s on one core; ufuncs of this size release the interpreter's lock.
    """
    lanes = [0, 0]
    for first, words in _host_words(array):
        position = _RAMP[:words.size] + _offset(first)
        _mix_in_place(position)
        mixed = words ^ position
        _mix_in_place(mixed)
        lanes[0] += int(mixed.sum(dtype=np.uint64))
        mixed *= position | np.uint32(1)
        lanes[1] += int(mixed.sum(dtype=np.uint64))
    return "".join(f"{lane & 0xFFFFFFFF:08x}" for lane in lanes)


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


@functools.lru_cache(maxsize=4096)
def _program(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    return _compiled(sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None).lower(
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)).compile()


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


_PIECE = 1 << 16    # words: 256 KiB and a few temporaries of that size
_RAMP = np.arange(_PIECE, dtype=np.uint32) * _POSITION_LOW


def _offset(first: int) -> np.uint32:
    """What `first`, the flat index of a piece, adds to the unmixed positions of its words (a piece does not cross a multiple of 2^32)."""
    low, high = first & 0xFFFFFFFF, first >> 32
    return np.uint32((low * int(_POSITION_LOW) + high * int(_POSITION_HIGH) + int(_SEED)) & 0xFFFFFFFF)


def _host_words(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(flat index of the first word, uint32 words) of the pieces of an array; see `_words`."""
    array = np.ascontiguousarray(array).reshape(-1)
    kind = jnp.dtype(array.dtype)
    bits = 8 if kind == jnp.bool_ else 8 * kind.itemsize
    if bits >= 32:      # complex numbers are pairs of floats, 64-bit numbers pairs of words, low word first
        words, mask = array.view(np.uint32), None
    else:
        words = array.view(np.dtype(f"uint{bits}"))
        integer = jnp.issubdtype(kind, jnp.integer)
        narrow = 8 if kind == jnp.bool_ else (jnp.iinfo(kind).bits if integer else jnp.finfo(kind).bits)
        mask = np.uint32((1 << narrow) - 1) if narrow < 8 else None
    for first in range(0, words.size, _PIECE):
        piece = words[first:first + _PIECE].astype(np.uint32, copy=False)
        yield first, piece if mask is None else piece & mask


def _mix_in_place(h: np.ndarray) -> None:
    """`_mix` of numpy words, in their own memory."""
    shifted = np.empty_like(h)
    for shift, factor in ((16, _MULTIPLY_1), (15, _MULTIPLY_2), (16, None)):
        np.right_shift(h, np.uint32(shift), out=shifted)
        np.bitwise_xor(h, shifted, out=h)
        if factor is not None:
            np.multiply(h, factor, out=h)
