"""What all towers share: the sizes and dtypes of a stack of `TransformerBlock`s, the stack with its final norm, and the projection behind the pooling."""
from functools import partial
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError
from vlm_jax.nn import LayerNorm, Linear, Stack, TransformerBlock
from vlm_jax.nn.precision import wide

PROJECTIONS = (None, "linear", "linear_no_bias", "linear_tanh")


class Tower(nn.Module):
    """The settings that every tower has.

    Attributes:
      width, depth, mlp_dim, num_heads: see `encoders.variants`.
      activation, norm_eps: of the blocks and norms.
      dropout: after positions and inside blocks.
      scan, remat: see `nn.Stack`.
      dtype, param_dtype, softmax_dtype: of products, parameters, and the softmax of attention.
    """
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @property
    def options(self) -> dict[str, str]:
        """The dtypes, as parts whose output is rounded take them."""
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)

    @property
    def unrounded(self) -> dict[str, str]:
        """The dtypes of a `Linear` whose output is a part of the stream, which is float32."""
        return dict(self.options, out_dtype=wide(self.dtype))

    @property
    def out_width(self) -> int:
        """The width of what it returns."""
        return self.width if getattr(self, "projection", None) is None else self.embed_dim


def final_norm(tower: Tower, x: Float[Array, "B T D"], name: str = "norm") -> Float[Array, "B T D"]:
    """A norm over the stream of a tower, called inside it."""
    return LayerNorm(tower.norm_eps, name=name, dtype=wide(tower.dtype), param_dtype=tower.param_dtype)(x)


def trunk(tower: Tower, x: Float[Array, "B T D"], *inputs: Any, train: bool = False, **settings: Any) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """The `blocks` and the `norm` of a tower, called inside it.

    Args:
      inputs: what each block gets besides x (a mask); settings: further ones of `TransformerBlock`.
    Returns:
      normalised tokens, and {"blocks": the intermediates of the blocks, "unnormalised": the tokens before the norm}.
    """
    block = partial(TransformerBlock, tower.num_heads, tower.mlp_dim, tower.activation, norm_eps=tower.norm_eps, dropout=tower.dropout,
                    softmax_dtype=tower.softmax_dtype, **tower.options, **settings)
    x, blocks = Stack(block, tower.depth, tower.scan, tower.remat, name="blocks")(x, *inputs, train=train)
    return final_norm(tower, x), {"blocks": blocks, "unnormalised": x}


def projected(tower: Any, pooled: Float[Array, "... D"], kernel_init: str | float) -> Float[Array, "... E"]:
    """What `tower.projection` (None, "linear", "linear_no_bias" or "linear_tanh") makes of pooled vectors, `embed_dim` wide; called inside the tower."""
    if tower.projection is None:
        return pooled
    x = Linear(tower.embed_dim, use_bias=tower.projection != "linear_no_bias", kernel_init=kernel_init, name="projection", **tower.unrounded)(pooled)
    return jnp.tanh(x) if tower.projection == "linear_tanh" else x


def check_projection(tower: str, projection: str | None, embed_dim: int | None) -> None:
    """Raises a ConfigError for an unknown kind of projection, or one without a width."""
    if projection not in PROJECTIONS:
        raise ConfigError(f'{tower}.projection: "{projection}" is unknown; choose "linear", "linear_no_bias", "linear_tanh" or None.')
    if projection is not None and not embed_dim:
        raise ConfigError(f"{tower}.embed_dim is missing: a projection needs the width it maps to.")
