"""Where numbers of few bits are rounded: products take and give them, everything between products is float32.

A model that computes in bfloat16 rounds what a matrix product reads and what it writes, once, after its bias. The sums to which blocks add (the residual
stream), norms, activations and rotations are float32. Rounding them too would save little: they are not what takes time, but each adds an error that all
further layers carry.
"""
from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wide(dtype: str | jnp.dtype) -> str:
    """The dtype in which numbers of `dtype` are summed: float32, or `dtype` itself where that has more bits."""
    return jnp.promote_types(dtype, jnp.float32).name


def rounded_once(function: Callable[..., Array], *inputs: Float[Array, "..."]) -> Float[Array, "..."]:
    """function(*inputs) of equal dtypes, computed in `wide` of it and rounded once. The backward pass keeps the inputs alone, in their own dtype, and computes
    `function` again: it is for functions of single entries."""
    if inputs[0].dtype == wide(inputs[0].dtype):
        return function(*inputs)
    return _rounded_once(function, *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_once(function, *inputs):
    dtype = inputs[0].dtype
    return function(*(x.astype(wide(dtype)) for x in inputs)).astype(dtype)


def _backward(function, inputs, gradient):
    dtype = wide(gradient.dtype)
    _, pull = jax.vjp(lambda *given: function(*(x.astype(dtype) for x in given)), *inputs)
    return pull(gradient.astype(dtype))


_rounded_once.defvjp(lambda function, *inputs: (_rounded_once(function, *inputs), inputs), _backward)
