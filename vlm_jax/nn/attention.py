"""Scaled dot-product attention, its one home, and multi-head self-attention.

Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
"""
import functools

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.nn.linear import Linear
from vlm_jax.sharding.activations import constrain, is_split


def allowed_keys(queries: int, keys: int, *, causal: bool = False, mask: Bool[Array, "B #H #T S"] | None = None,
                 lengths: Int[Array, "B"] | None = None) -> Bool[Array, "#B #H #T S"] | None:
    """Which keys each query may read, as one mask that broadcasts to [B, H, T, S]; None where all may read all.

    Args:
      queries, keys: T and S.
      causal: query i reads keys up to i + S - T (the last query reads the last key).
      mask: True where reading is allowed; four axes.
      lengths: the number of valid keys of each example.
    """
    parts = []
    if causal:
        parts.append((jnp.arange(queries)[:, None] + keys - queries >= jnp.arange(keys)[None, :])[None, None])
    if mask is not None:
        if mask.ndim != 4:
            raise ValueError(f"attention: the mask has shape {mask.shape}; give it four axes, [batch, heads, queries, keys], of size 1 where shared.")
        parts.append(mask.astype(bool))
    if lengths is not None:
        parts.append((jnp.arange(keys)[None, :] < lengths[:, None])[:, None, None])
    return functools.reduce(jnp.logical_and, parts) if parts else None


def attention(query: Float[Array, "B T H K"], key: Float[Array, "B S H K"], value: Float[Array, "B S H K"], *, causal: bool = False,
              mask: Bool[Array, "B #H #T S"] | None = None, lengths: Int[Array, "B"] | None = None, scale: float | None = None,
              softmax_dtype: str = "float32") -> Float[Array, "B T H K"]:
    """softmax(query key^T scale) value for each head, in the dtype of `value`.

    Args:
      causal, mask, lengths: see `allowed_keys`. A query that may read no key gets zeros, and passes no gradient.
      scale: by default 1 / sqrt(K).
      softmax_dtype: of the logits, the exponentials and their sum.
    """
    allowed = allowed_keys(query.shape[1], key.shape[1], causal=causal, mask=mask, lengths=lengths)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    swapped = (x.swapaxes(1, 2) for x in (query, key, value))
    return _attend(*swapped, allowed, float(scale), jnp.dtype(softmax_dtype)).swapaxes(1, 2)


def attention_weights(query: Float[Array, "B T H K"], key: Float[Array, "B S H K"], *, causal: bool = False,
                      mask: Bool[Array, "B #H #T S"] | None = None, lengths: Int[Array, "B"] | None = None,
                      scale: float | None = None) -> Float[Array, "B H T S"]:
    """The weights that `attention` applies, in float32, for analyses and pictures; rows sum to 1, or to 0 where no key may be read."""
    allowed = allowed_keys(query.shape[1], key.shape[1], causal=causal, mask=mask, lengths=lengths)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights, total = _exponentials(query.swapaxes(1, 2), key.swapaxes(1, 2), allowed, float(scale), jnp.dtype("float32"))
    return weights / total


def _exponentials(query, key, allowed, scale, softmax_dtype):
    """exp(scale (logits - their maximum)) [B, H, T, S], 0 where not allowed, and its row sums (1 for empty rows)."""
    logits = jnp.einsum("bhtk,bhsk->bhts", query, key, preferred_element_type=softmax_dtype)
    if allowed is not None:
        logits = jnp.where(allowed, logits, jnp.finfo(softmax_dtype).min)
    weights = jnp.exp((logits - logits.max(-1, keepdims=True)) * scale)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0)
    total = weights.sum(-1, keepdims=True)
    return weights, jnp.where(total == 0, jnp.ones_like(total), total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, allowed, scale, softmax_dtype):
    return _attend_forward(query, key, value, allowed, scale, softmax_dtype)[0]


def _attend_forward(query, key, value, allowed, scale, softmax_dtype):
    weights, total = _exponentials(query, key, allowed, scale, softmax_dtype)
    weights = weights.astype(value.dtype)
    # The sum divides the small product, not the large weights.
    out = (jnp.einsum("bhts,bhsk->bhtk", weights, value, preferred_element_type=softmax_dtype) / total).astype(value.dtype)
    out = checkpoint_name(out, "mixed")   # here, since the backward pass reads it
    return out, (query, key, value, weights, total, out)


def _attend_backward(scale, softmax_dtype, saved, gradient):
    query, key, value, weights, total, out = saved
    divided = gradient.astype(softmax_dtype) / total
    # sum_s p (dp) over the keys equals the inner product of the output and its gradient: a pass over [T, K] instead of [T, S].
    shared = (divided * out.astype(softmax_dtype)).sum(-1, keepdims=True)
    divided = divided.astype(value.dtype)
    d_value = jnp.einsum("bhts,bhtk->bhsk", weights, divided)
    d_weights = jnp.einsum("bhtk,bhsk->bhts", divided, value, preferred_element_type=softmax_dtype)
    d_logits = (weights.astype(softmax_dtype) * (d_weights - shared) * scale).astype(query.dtype)
    d_query = jnp.einsum("bhts,bhsk->bhtk", d_logits, key)
    d_key = jnp.einsum("bhts,bhtk->bhsk", d_logits, query)
    return d_query, d_key, d_value, None


_attend.defvjp(_attend_forward, _attend_backward)


class SelfAttention(nn.Module):
    """Multi-head self-attention: projections `query`, `key`, `value` [width, heads, head_dim] and `out` [heads, head_dim, width], all with biases.

    Attributes:
      num_heads: must divide the width.
      causal: each token reads itself and those before it.
      qkv_init, out_init: see `initializer`.
    Raises:
      ConfigError: if the heads do not divide the width.
    """
    num_heads: int
    causal: bool = False
    qkv_init: str | float = "xavier_uniform"
    out_init: str | float = "xavier_uniform"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B #H #T T"] | None = None) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        heads = (self.num_heads, head_size(width, self.num_heads))
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        query, key, value = (checkpoint_name(split_heads(Linear(heads, kernel_init=self.qkv_init, name=name, **options)(x), tokens), "qkv")
                             for name, tokens in (("query", "sequence"), ("key", "keys"), ("value", "keys")))
        mixed = attention(query, key, value, causal=self.causal, mask=mask, softmax_dtype=self.softmax_dtype)
        mixed = constrain(mixed, "batch", "sequence", "heads", "head_dim")
        return Linear(width, contract=2, kernel_init=self.out_init, name="out", **options)(mixed)


def split_heads(x: Float[Array, "B T H K"], tokens: str) -> Float[Array, "B T H K"]:
    """Lays out queries (`tokens="sequence"`) or keys and values ("keys") of attention: heads over `tensor`; the queries stay split over `sequence` and
    meet all keys, which are gathered for that."""
    if tokens == "keys" and is_split("sequence"):
        x = constrain(x, "batch", "sequence", "heads", "head_dim")   # the projection itself is taken before the gathering
    return constrain(x, "batch", tokens, "heads", "head_dim")


def head_size(width: int, num_heads: int) -> int:
    """width / num_heads, or a ConfigError where that is not whole."""
    if num_heads <= 0 or width % num_heads:
        raise ConfigError(f"num_heads: {num_heads} heads do not divide the width {width}; choose a divisor.")
    return width // num_heads
