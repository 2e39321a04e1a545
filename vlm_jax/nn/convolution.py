"""Convolutions, and those of networks without normalisation, whose kernels are standardised instead of their activations.

Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized ResNets" (2021), section 4.1.
"""
import functools
import math

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.precision import wide

LEAST_VARIANCE = 1e-4   # of a kernel's column times its inputs


class StandardizedConv(nn.Module):
    """A convolution, padded as "SAME" does it, with scaled weight standardisation.

    Each output channel's weights are brought to mean 0 and variance 1 / inputs, times a learned `gain`, so that an input of variance 1 gives an output of
    variance 1. It is computed in float32 and the kernel rounded once. Parameters: `kernel` [size, size, inputs / groups, features], `gain` [features] from 1,
    `bias` [features] from 0.

    Attributes:
      size, stride, groups: of the square kernel.
      dtype: of the product's inputs and of the output; sums and the bias are float32 where it is narrower.
      out_dtype: of the output, where it is another.
    """
    features: int
    size: int
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    out_dtype: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        inputs, dtype, summed = x.shape[-1] // self.groups, jnp.dtype(self.param_dtype), wide(self.dtype)
        shape = (self.size, self.size, inputs, self.features)
        kernel = self.param("kernel", initializer(math.prod(shape[:-1]) ** -0.5), shape, dtype)
        gain = self.param("gain", initializer("ones"), (self.features,), dtype)
        kernel = standardized(kernel.astype(summed), gain.astype(summed)).astype(self.dtype)
        y = convolution(x.astype(self.dtype), kernel, self.stride, self.groups, summed if self.use_bias else self.out_dtype or self.dtype)
        if self.use_bias:
            y = y + self.param("bias", initializer("zeros"), (self.features,), dtype).astype(summed)
        return y.astype(self.out_dtype or self.dtype)


def standardized(kernel: Float[Array, "h w I O"], gain: Float[Array, "O"]) -> Float[Array, "h w I O"]:
    """gain (kernel - mean) / sqrt(max(N variance, 1e-4)), mean and variance over the N weights of each output."""
    centred = kernel - kernel.mean((0, 1, 2))
    variance = jnp.square(centred).mean((0, 1, 2))
    return centred * (gain * lax.rsqrt(jnp.maximum(math.prod(kernel.shape[:3]) * variance, LEAST_VARIANCE)))


def convolution(x: Float[Array, "B H W C"], kernel: Float[Array, "h w I O"], stride: int = 1, groups: int = 1,
                out_dtype: str | None = None) -> Float[Array, "B H/s W/s O"]:
    """The convolution of x with `kernel`, summed in `out_dtype`, with ceil(size / stride) outputs an axis.

    Padding is zeros, divided evenly between both ends; the end has the odd one, as "SAME" says in XLA and TensorFlow.
    """
    return _kept_sums(x, kernel, stride, groups, out_dtype) if out_dtype not in (None, x.dtype.name) else _convolve(x, kernel, stride, groups)


def _convolve(x, kernel, stride, groups, out_dtype=None):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
                                    preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _kept_sums(x, kernel, stride, groups, out_dtype):
    """A convolution of narrow numbers whose sums are kept. Its gradient is rounded before it is multiplied, as that of `linear.product` is."""
    return _convolve(x, kernel, stride, groups, out_dtype)


def _backward(stride, groups, out_dtype, saved, gradient):
    _, pull = jax.vjp(lambda x, kernel: _convolve(x, kernel, stride, groups), *saved)
    return pull(gradient.astype(saved[0].dtype))


_kept_sums.defvjp(lambda x, kernel, stride, groups, out_dtype: (_kept_sums(x, kernel, stride, groups, out_dtype), (x, kernel)), _backward)
