"""The one home of kernels: every matrix of the library is applied here."""
from collections.abc import Mapping
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.precision import wide
from vlm_jax.sharding.activations import is_split

LARGE_KERNEL = 2 ** 18   # entries; smaller ones stay in a core's own cache


class Linear(nn.Module):
    """A linear map from the last `contract` axes of its input to the axes `features`.

    The kernel has the shape [*inputs, *features], for instance [width, heads, head_dim] or [heads, head_dim, width]; it is initialised as the
    matrix it is (all inputs against all outputs). It is applied as one two-dimensional product, for which every backend has its fastest routine, but on a
    mesh that splits tokens: rows and tokens as one axis could not stay split over two mesh axes.

    Two things are data, not settings: they are there if their parameters are (`training/adapters.py` makes them), also under `Stack`, with its layer axis.
      `scale` [*features]: the kernel is int8, entry q of output column c stands for q * scale[c]; the product is taken with the integers, which are
        converted on the way, and scaled afterwards, so that no float copy of the kernel is kept.
      `lora`: {"a" [rows, r], "b" [r, columns], "scaling" [], and perhaps "dropout" []}: adds scaling (dropout(x) a) b, rows and columns being all inputs
        and all features as one axis. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1. Dropout is active where a
        "dropout" key is given. Scaling and the dropout rate are constants: they have no gradient.

    Attributes:
      features: the size of the output axis, or a tuple of sizes.
      contract: how many trailing axes of the input are summed over.
      kernel_init, bias_init: a name of `INITIALIZERS` or the standard deviation of a normal distribution.
      dtype: of the products' inputs and of the output, which is rounded to it once: products are summed, and biases added, in float32 where it is narrower.
      param_dtype: of the parameters.
      out_dtype: of the output, where it is another.
    """
    features: int | tuple[int, ...]
    contract: int = 1
    use_bias: bool = True
    kernel_init: str | float = "xavier_uniform"
    bias_init: str | float = "zeros"
    dtype: str = "float32"
    param_dtype: str = "float32"
    out_dtype: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        leading, inputs = x.shape[:x.ndim - self.contract], x.shape[x.ndim - self.contract:]
        rows, columns = math.prod(inputs), math.prod(features)

        def init(key, shape, dtype):
            return initializer(self.kernel_init)(key, (rows, columns), dtype).reshape(shape)

        kernel = self.param("kernel", init, (*inputs, *features), jnp.dtype(self.param_dtype))
        flat = (-1,) if len(leading) < 2 or not is_split("sequence") else leading
        x = x.astype(self.dtype).reshape(*flat, rows)
        out_dtype, scaled, adapted = self.out_dtype or self.dtype, self.has_variable("params", "scale"), self.has_variable("params", "lora")
        summed = wide(self.dtype) if scaled or adapted or self.use_bias else out_dtype   # where nothing follows, the product itself is rounded
        y = product(x, kernel.astype(self.dtype).reshape(rows, columns), summed)
        if scaled:
            y = y * self.get_variable("params", "scale").astype(summed).reshape(columns)
        if adapted:
            y = y + self._adapted(x, self.get_variable("params", "lora"))
        if self.use_bias:
            bias = self.param("bias", initializer(self.bias_init), features, jnp.dtype(self.param_dtype))
            y = y + bias.astype(summed).reshape(columns)
        return y.astype(out_dtype).reshape(*leading, *features)

    def _adapted(self, x: Float[Array, "... rows"], lora: Mapping[str, Array]) -> Float[Array, "... columns"]:
        """What the adapter adds to the product of flat inputs."""
        if "dropout" in lora and self.has_rng("dropout"):
            rate = jax.lax.stop_gradient(lora["dropout"]).astype(jnp.float32)
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, x.shape)
            x = jnp.where(keep, x / (1.0 - rate).astype(x.dtype), jnp.zeros_like(x))
        scaling = jax.lax.stop_gradient(lora["scaling"]).astype(x.dtype)
        return scaling * ((x @ lora["a"].astype(x.dtype)) @ lora["b"].astype(x.dtype))


def product(x: Float[Array, "... rows"], kernel: Float[Array, "rows columns"], out_dtype: str | None = None) -> Float[Array, "... columns"]:
    """x @ kernel, summed in `out_dtype`.

    For one row (a decoding step) against a large kernel a CPU is as fast as it reads the kernel, and XLA's routine for it reads with little more than one
    core; as a batch of two halves of the sum, which lie one behind the other in memory, both are read at once.
    """
    rows, columns = kernel.shape
    alone = math.prod(x.shape[:-1]) == 1 and rows % 2 == 0 and rows * columns >= LARGE_KERNEL
    if not alone or jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty:
        return _matmul(x, kernel, out_dtype) if out_dtype not in (None, x.dtype.name) else jnp.matmul(x, kernel)
    halves = jnp.einsum("hr,hrc->hc", x.reshape(2, rows // 2), kernel.reshape(2, rows // 2, columns), preferred_element_type=out_dtype)
    return halves.sum(0).reshape(*x.shape[:-1], columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Float[Array, "... rows"], kernel: Float[Array, "rows columns"], out_dtype: str) -> Float[Array, "... columns"]:
    """A product of narrow numbers whose sums are kept. Its gradient is rounded before it is multiplied, else accelerators would take wide products."""
    return jnp.matmul(x, kernel, preferred_element_type=out_dtype)


def _matmul_backward(out_dtype, saved, gradient):
    _, pull = jax.vjp(jnp.matmul, *saved)
    return pull(gradient.astype(saved[0].dtype))


_matmul.defvjp(lambda x, kernel, out_dtype: (_matmul(x, kernel, out_dtype), (x, kernel)), _matmul_backward)


def added_dtype(dtype: str, axis: str) -> str:
    """Of what a block adds to the stream by a product that sums over the logical `axis`: `wide`, as the stream; but `dtype` where a mesh splits the axis, since
    its devices exchange their parts of the sum, which would be twice the bytes."""
    return dtype if is_split(axis) else wide(dtype)


def effective(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a `Linear` of two axes without `lora` and `scale`, whose kernel gives the same products: for those who read kernels themselves."""
    leaves = dict(leaves)
    lora, scale = leaves.pop("lora", None), leaves.pop("scale", None)
    if scale is not None:
        leaves["kernel"] = leaves["kernel"].astype(scale.dtype) * scale
    if lora is not None:
        change = jax.lax.stop_gradient(lora["scaling"]) * (lora["a"] @ lora["b"])
        leaves["kernel"] = (leaves["kernel"].astype(jnp.float32) + change).astype(leaves["kernel"].dtype)
    return leaves


def input_axes(name: str, kernel_axes: int, bias_axes: int | None = None) -> int:
    """Returns how many leading axes of a `Linear`'s kernel it contracts, from what its parameters show (without the layer axis of a stack).

    The bias has the axes of the output. Where there is none, the conventions of this library say it: a kernel [heads, head_dim, width] belongs to a module
    called `out`, any other of three axes is [width, heads, head_dim], and one of four is a patch [height, width, channels, features].

    Args:
      name: the module's path or its last part.
    """
    if bias_axes is not None:
        return kernel_axes - bias_axes
    if kernel_axes == 3:
        return 2 if name.rsplit("/", 1)[-1] == "out" else 1
    return kernel_axes - 1
