"""Layer normalisation with statistics in float32 and a derivative that reads the input once.

Ba et al., "Layer Normalization" (2016), section 3.
"""
import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis; mean and variance in float32, the result in the dtype of x."""
    return _forward(x, scale, bias, eps)[0]


def _forward(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    inverse = lax.rsqrt(variance + eps)
    y = (wide - mean) * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(x.dtype), (x, mean, inverse, scale, bias)


def _backward(eps, saved, gradient):
    x, mean, inverse, scale, bias = saved
    gradient = gradient.astype(jnp.float32)
    normalised = (x.astype(jnp.float32) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    scaled = gradient * scale.astype(jnp.float32)
    # d/dx of the normalisation: remove from the gradient its mean and its part along the normalised input.
    dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - normalised * (scaled * normalised).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (gradient * normalised).sum(rows).astype(scale.dtype), gradient.sum(rows).astype(bias.dtype)


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """`layer_norm` with learned scale (starts at 1) and bias (starts at 0); output in `dtype`."""
    eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.param_dtype))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.dtype(self.param_dtype))
        return layer_norm(x.astype(self.dtype), scale, bias, self.eps)
