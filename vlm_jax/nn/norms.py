"""Layer and root-mean-square normalisation with statistics in float32 and derivatives that read the input once.

Ba et al., "Layer Normalization" (2016), section 3; Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""
import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.settings import choose


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float, dtype: str | None = None) -> Float[Array, "... D"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis; all of it in float32, the result in `dtype`, by default that of x."""
    return _forward(x, scale, bias, eps, dtype)[0]


def _forward(x, scale, bias, eps, dtype):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    inverse = lax.rsqrt(variance + eps)
    y = (wide - mean) * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(dtype or x.dtype), (x, mean, inverse, scale, bias)


def _backward(eps, dtype, saved, gradient):
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
    """`layer_norm` with learned scale (starts at 1) and bias (starts at 0), unless `use_scale` or `use_bias` are False; output in `dtype`."""
    eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    use_bias: bool = True
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        shape, dtype = (x.shape[-1],), jnp.dtype(self.param_dtype)
        scale = self.param("scale", nn.initializers.ones, shape, dtype) if self.use_scale else jnp.ones(shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, dtype) if self.use_bias else jnp.zeros(shape, dtype)
        return layer_norm(x, scale, bias, self.eps, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float, offset: float = 0.0, dtype: str | None = None) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis; all of it in float32, the result in `dtype`, by default that of x."""
    return _rms_forward(x, scale, eps, offset, dtype)[0]


def _rms_forward(x, scale, eps, offset, dtype):
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (wide * inverse * (offset + scale.astype(jnp.float32))).astype(dtype or x.dtype), (x, inverse, scale)


def _rms_backward(eps, offset, dtype, saved, gradient):
    x, inverse, scale = saved
    gradient = gradient.astype(jnp.float32)
    normalised = x.astype(jnp.float32) * inverse
    scaled = gradient * (offset + scale.astype(jnp.float32))
    # Remove from the gradient its part along the normalised input.
    dx = inverse * (scaled - normalised * (scaled * normalised).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (gradient * normalised).sum(tuple(range(x.ndim - 1))).astype(scale.dtype)


rms_norm.defvjp(_rms_forward, _rms_backward)


class RmsNorm(nn.Module):
    """`rms_norm` with a learned scale; output in `dtype`.

    Attributes:
      offset: the factor is offset + scale, which starts at 1: 0 for Llama and T5, 1 for Gemma, whose scale starts at 0.
    """
    eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],), jnp.dtype(self.param_dtype))
        return rms_norm(x, scale, self.eps, self.offset, self.dtype)


NORMS = {"layer": LayerNorm, "layer_no_bias": functools.partial(LayerNorm, use_bias=False),
         "layer_plain": functools.partial(LayerNorm, use_bias=False, use_scale=False), "rms": RmsNorm, "rms_plus_one": functools.partial(RmsNorm, offset=1.0)}


def norm(kind: str, eps: float = 1e-6, *, dtype: str = "float32", param_dtype: str = "float32", name: str | None = None) -> nn.Module:
    """The normalisation that `kind` names in `NORMS`: parameters `scale` and, of "layer", `bias`.

    Raises:
      ConfigError: for an unknown kind.
    """
    return choose(NORMS, kind, "norm")(eps, dtype, param_dtype, name=name)
