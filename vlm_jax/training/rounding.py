"""Optimiser state in bfloat16 with stochastic rounding.

A running mean changes by 1 - b of the difference at each step; with b2 = 0.999 that is a thousandth, bfloat16 tells numbers apart by a 256th. Rounding to the
nearest would leave it where it is for good. Rounding up or down at random, with the probabilities that make the expectation exact, moves it as far on average
as it should. The random bits are a hash of step, leaf and place: the same on every mesh and after every resume, and fused into the update by the compiler.
"""
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32
import optax


def stochastic_round(x: Float[Array, "..."], bits: UInt32[Array, "..."]) -> Array:
    """Returns float32 `x` as bfloat16: one of its two neighbours, by the lower 16 of `bits`, so that the expectation is `x`. Numbers that bfloat16 holds stay;
    so do infinities and NaN."""
    raw = lax.bitcast_convert_type(x, jnp.uint32)
    rounded = lax.bitcast_convert_type((raw + (bits & 0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def random_bits(shape: tuple[int, ...], seed: Any) -> UInt32[Array, "..."]:
    """Returns one hash a place of an array, from its index and `seed`: two rounds of the finaliser of MurmurHash3, enough for rounding and nothing more."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(_mix(index) ^ jnp.asarray(seed, jnp.uint32))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def kept_in(method: optax.GradientTransformation, dtypes: Mapping[str, Any]) -> optax.GradientTransformation:
    """Returns `method` with fields of its state, a named tuple with a `count`, kept in other dtypes: bfloat16 is rounded stochastically.

    Args:
      dtypes: {field: dtype}, as {"mu": bfloat16}; float32 changes nothing.
    """
    low = [field for field, dtype in dtypes.items() if jnp.dtype(dtype) == jnp.bfloat16]
    if not low:
        return method

    def widen(state):
        return state._replace(**{field: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), getattr(state, field)) for field in low})

    def init(params):
        state = method.init(params)
        return state._replace(**{field: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), getattr(state, field)) for field in low})

    def update(gradients, state, params=None):
        updates, exact = method.update(gradients, widen(state), params)
        step, rounded = _mix(exact.count.astype(jnp.uint32)), {}
        for field in low:
            leaves, structure = jax.tree.flatten(getattr(exact, field))
            number = 1 + list(dtypes).index(field)
            seeds = [_mix(step + jnp.uint32(number * 0x9E3779B9 + place & 0xFFFFFFFF)) for place in range(len(leaves))]
            rounded[field] = structure.unflatten([stochastic_round(leaf, random_bits(leaf.shape, seed)) for leaf, seed in zip(leaves, seeds)])
        return updates, exact._replace(**rounded)
    return optax.GradientTransformation(init, update)
