"""Activations by name. Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); So et al., "Primer" (2021) for the squared ReLU."""
from collections.abc import Callable
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, x times the normal distribution function of x."""
    return jax.nn.gelu(x, approximate=False)


@jax.custom_jvp
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh approximation, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); its derivative reuses the tanh of the forward pass."""
    return 0.5 * x * (1.0 + _tanh_term(x))


def _tanh_term(x):
    return jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x)))


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    t = _tanh_term(x)
    inner = math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * (x * x))
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    return 0.5 * x * (1.0 + t), slope * dx


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's approximation, x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def squared_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0) squared."""
    return jnp.square(jax.nn.relu(x))


@jax.custom_jvp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(x), computed in float32 and rounded once: in bfloat16 a rounded sigmoid doubles the error."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.nn.sigmoid(wide)).astype(x.dtype)


@silu.defjvp
def _silu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    gate = jax.nn.sigmoid(wide)
    return (wide * gate).astype(x.dtype), (gate * (1.0 + wide * (1.0 - gate))).astype(x.dtype) * dx


def linear(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x itself."""
    return x


ACTIVATIONS: dict[str, Callable] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "squared_relu": squared_relu, "relu": jax.nn.relu,
                                    "relu6": jax.nn.relu6, "leaky_relu": jax.nn.leaky_relu, "silu": silu, "mish": jax.nn.mish,
                                    "hard_swish": jax.nn.hard_swish, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, "linear": linear}
