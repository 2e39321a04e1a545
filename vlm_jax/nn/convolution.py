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
from vlm_jax.sharding.activations import constrain

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

    Padding is zeros, divided evenly between both ends; the end has the odd one, as "SAME" says in XLA and TensorFlow. On a mesh every device has the whole
    kernel and its own pictures.
    """
    kernel = constrain(kernel, None, None, None, None)
    out_dtype = None if out_dtype in (None, x.dtype.name) else out_dtype
    return _convolve(x, kernel, stride, groups) if out_dtype is None and groups == 1 else _with_own_gradient(x, kernel, stride, groups, out_dtype)


def _convolve(x, kernel, stride, groups, out_dtype=None):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
                                    preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _with_own_gradient(x, kernel, stride, groups, out_dtype):
    """One in groups, or of narrow numbers whose sums are kept; its gradient is rounded before it is multiplied, as that of `linear.product` is."""
    return _convolve(x, kernel, stride, groups, out_dtype)


def _backward(stride, groups, out_dtype, saved, gradient):
    x, kernel = saved
    gradient = gradient.astype(x.dtype)
    if groups == 1:
        return jax.vjp(lambda x, kernel: _convolve(x, kernel, stride, groups), x, kernel)[1](gradient)
    return *jax.vjp(lambda x: _convolve(x, kernel, stride, groups), x)[1](gradient), _kernel_gradient(x, gradient, kernel, stride, groups)


_with_own_gradient.defvjp(lambda x, kernel, stride, groups, out_dtype: (_convolve(x, kernel, stride, groups, out_dtype), (x, kernel)), _backward)


def _kernel_gradient(x, gradient, kernel, stride, groups):
    """Of a convolution in groups, as a product for each place of the kernel.

    JAX's own is a convolution that the partitioner of XLA splits wrongly: where devices share pictures (a mesh with a `tensor` or `sequence` axis), it adds
    the same pictures once for each of them (jax 0.10.2, on CPUs).
    """
    height, width, inputs, outputs = kernel.shape
    (batch, down, across, _), step = gradient.shape, stride
    pads = lax.padtype_to_pads(x.shape[1:3], (height, width), (stride, stride), "SAME")
    x = jnp.pad(x.reshape(*x.shape[:3], groups, inputs), ((0, 0), *pads, (0, 0), (0, 0)))
    gradient = gradient.reshape(batch, down, across, groups, outputs // groups)

    def product(row: int, column: int) -> jax.Array:
        window = x[:, row:row + step * (down - 1) + 1:step, column:column + step * (across - 1) + 1:step]
        return jnp.einsum("byxgi,byxgo->igo", window, gradient, preferred_element_type=wide(x.dtype)).reshape(inputs, outputs)
    return jnp.stack([jnp.stack([product(row, column) for column in range(width)]) for row in range(height)]).astype(kernel.dtype)
