"""The one home of kernels: every matrix of the library is applied here."""
import math

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.nn.initializers import initializer
from vlm_jax.sharding.activations import is_split


class Linear(nn.Module):
    """A linear map from the last `contract` axes of its input to the axes `features`.

    The kernel has the shape [*inputs, *features], for instance [width, heads, head_dim] or [heads, head_dim, width]; it is initialised as the
    matrix it is (all inputs against all outputs). It is applied as one two-dimensional product, for which every backend has its fastest routine, but on a
    mesh that splits tokens: rows and tokens as one axis could not stay split over two mesh axes.

    Attributes:
      features: the size of the output axis, or a tuple of sizes.
      contract: how many trailing axes of the input are summed over.
      kernel_init, bias_init: a name of `INITIALIZERS` or the standard deviation of a normal distribution.
      dtype: of the computation and the output; param_dtype: of the parameters.
    """
    features: int | tuple[int, ...]
    contract: int = 1
    use_bias: bool = True
    kernel_init: str | float = "xavier_uniform"
    bias_init: str | float = "zeros"
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        leading, inputs = x.shape[:x.ndim - self.contract], x.shape[x.ndim - self.contract:]
        rows, columns = math.prod(inputs), math.prod(features)

        def init(key, shape, dtype):
            return initializer(self.kernel_init)(key, (rows, columns), dtype).reshape(shape)

        kernel = self.param("kernel", init, (*inputs, *features), jnp.dtype(self.param_dtype))
        flat = (-1,) if len(leading) < 2 or not is_split("sequence") else leading
        y = x.astype(self.dtype).reshape(*flat, rows) @ kernel.astype(self.dtype).reshape(rows, columns)
        if self.use_bias:
            bias = self.param("bias", initializer(self.bias_init), features, jnp.dtype(self.param_dtype))
            y = y + bias.astype(self.dtype).reshape(columns)
        return y.reshape(*leading, *features)
