"""From tokens to one vector: multi-head attention pooling, and poolings without parameters."""
from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.nn.attention import attention, head_size, split_heads
from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.linear import Linear, added_dtype
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.norms import LayerNorm

POOLINGS = ("map", "gap", "cls", "last", "eot", "eot_or_first", "argmax", "none")


def pool(x: Float[Array, "B T D"], kind: str, *, tokens: Int[Array, "B T"] | None = None, eot_id: int | None = None) -> Float[Array, "..."]:
    """Poolings without parameters.

    Args:
      kind: "gap" the mean over tokens; "cls" the first; "last" the last; "eot" the first whose id is `eot_id` (the last token of a text without one);
        "eot_or_first" the same, with the first token of a text without one;
        "argmax" the first with the highest id (CLIP's rule); "none" all tokens.
      tokens: the ids, for "eot" and "argmax".
    Raises:
      ConfigError: for an unknown kind, or one that lacks what it needs.
    """
    if kind == "none":
        return x
    if kind == "gap":
        return x.mean(1)
    if kind == "cls":
        return x[:, 0]
    if kind == "last":
        return x[:, -1]
    if kind not in ("eot", "eot_or_first", "argmax"):
        raise ConfigError(f'pool: "{kind}" is unknown here; choose one of {", ".join(POOLINGS)}.')
    if tokens is None or (kind != "argmax" and eot_id is None):
        raise ConfigError(f'pool: "{kind}" needs token ids{" and eot_id" if kind != "argmax" else ""}; it is for text towers.')
    if kind == "argmax":
        index = tokens.argmax(1)
    else:
        found = tokens == eot_id
        index = jnp.where(found.any(1), found.argmax(1), tokens.shape[1] - 1 if kind == "eot" else 0)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


class AttentionPooling(nn.Module):
    """Multi-head attention pooling: one learned probe reads all tokens (those of `mask`, where it is given), then h + mlp(norm(h)).

    Zhai et al., "Scaling Vision Transformers" (2022), section 2.1; the head of SigLIP's image tower.
    """
    num_heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B #H #T T"] | None = None) -> Float[Array, "B D"]:
        batch, _, width = x.shape
        heads = (self.num_heads, head_size(width, self.num_heads))
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        probe = self.param("probe", initializer("xavier_uniform"), (1, width), jnp.dtype(self.param_dtype))
        # The query is the same for every example: projected once, then repeated.
        query = Linear(heads, name="query", **options)(probe[None])
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        key, value = (split_heads(Linear(heads, name=name, **options)(x), "keys") for name in ("key", "value"))
        mixed = attention(split_heads(query, "sequence"), key, value, mask=mask, softmax_dtype=self.softmax_dtype)
        h = Linear(width, contract=2, out_dtype=added_dtype(self.dtype, "heads"), name="out", **options)(mixed)
        normed = LayerNorm(self.norm_eps, name="norm", **options)(h)
        return (h + Mlp(self.mlp_dim, self.activation, name="mlp", **options)(normed))[:, 0]
