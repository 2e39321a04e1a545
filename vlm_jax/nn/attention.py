"""Scaled dot-product attention, its one home, and multi-head self-attention.

Vaswani et al., "Attention Is All You Need" (2017), section 3.2; grouped queries: Ainslie et al., "GQA" (2023).
"""
import functools

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.nn import kernels
from vlm_jax.nn.biases import RelativeBias
from vlm_jax.nn.blockwise import Masks, attend_in_blocks, capped, exponentials, product, regroup, sum_to
from vlm_jax.nn.linear import Linear, added_dtype
from vlm_jax.nn.visibility import Visibility
from vlm_jax.sharding.activations import constrain, is_split

KEYS_AT_ONCE = 2048   # with more keys (and more than FEW_QUERIES) attention works in blocks of keys and keeps no [T, S] array
FEW_QUERIES = 8       # a decoding step: its [T, S] array is no larger than what it reads


def allowed_keys(queries: int, keys: int, *, causal: bool = False, mask: Bool[Array, "B #H #T S"] | None = None,
                 lengths: Int[Array, "B"] | None = None, visibility: Visibility | None = None) -> Bool[Array, "#B #H #T S"] | None:
    """Which keys each query may read, as one mask that broadcasts to [B, H, T, S]; None where all may read all. What is given holds together.

    Args:
      queries, keys: T and S.
      causal: query i reads keys up to i + S - T (the last query reads the last key).
      mask: True where reading is allowed; four axes.
      lengths: the number of valid keys of each example.
      visibility: facts about positions, see `Visibility`.
    """
    return _masks(queries, keys, causal, mask, lengths, visibility).allowed(jnp.arange(keys))


def _masks(queries, keys, causal, mask, lengths, visibility) -> Masks:
    if mask is not None and mask.ndim != 4:
        raise ValueError(f"attention: the mask has shape {mask.shape}; give it four axes, [batch, heads, queries, keys], of size 1 where shared.")
    if visibility is not None and (visibility.query_position.shape[1], visibility.key_position.shape[1]) != (queries, keys):
        raise ValueError(f"attention: the visibility is of {visibility.query_position.shape[1]} queries and {visibility.key_position.shape[1]} keys, not of "
                         f"{queries} and {keys}; give the positions of these.")
    last_key = jnp.arange(queries) + (keys - queries) if causal else None
    return Masks(last_key, None if mask is None else mask.astype(bool), lengths, visibility)


def attention(query: Float[Array, "B T H K"], key: Float[Array, "B S G K"], value: Float[Array, "B S G K"], *, causal: bool = False,
              mask: Bool[Array, "B #H #T S"] | None = None, lengths: Int[Array, "B"] | None = None, visibility: Visibility | None = None,
              bias: Float[Array, "#B #H #T #S"] | RelativeBias | None = None, soft_cap: float | None = None, scale: float | None = None,
              softmax_dtype: str = "float32") -> Float[Array, "B T H K"]:
    """softmax(query key^T scale + bias) value for each head, in the dtype of `value`.

    Above `KEYS_AT_ONCE` keys it works in blocks of keys, with a running maximum and sum, and computes the weights of a block again in the backward pass
    (Dao et al., "FlashAttention", 2022): memory grows with T + S.

    Args:
      key, value: of G heads; G divides H, and head h reads key head h // (H / G).
      causal, mask, lengths, visibility: see `allowed_keys`. A query that may read no key gets zeros, and passes no gradient.
      bias: added to the scaled (and capped) logits; four axes that broadcast, or a `RelativeBias`, whose table is differentiated too.
      soft_cap: c turns a logit x into c tanh(x / c), before the bias.
      scale: by default 1 / sqrt(K).
      softmax_dtype: of the logits, the exponentials and their sum.
    Raises:
      ConfigError: if the key heads do not divide the query heads.
    """
    queries, heads, keys, groups = *query.shape[1:3], *key.shape[1:3]
    masks = _masks(queries, keys, causal, mask, lengths, visibility)
    if heads % groups == 0 and kernels.fits(query, key, value, mask=mask, lengths=lengths, visibility=visibility, bias=bias, softmax_dtype=softmax_dtype):
        return kernels.attend(query, key, value, causal=causal, visibility=visibility, soft_cap=soft_cap, scale=scale)
    blocks = in_blocks(queries, keys)
    if isinstance(bias, RelativeBias) and not blocks:
        bias = bias.dense()
    query, bias, options = _prepare(query, groups, bias, soft_cap, scale, softmax_dtype)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    if blocks:
        out = attend_in_blocks(query, key, value, bias, masks, *options)
    else:
        out = _attend(query, key, value, regroup(masks.allowed(jnp.arange(keys)), heads, groups), bias, *options)
    return out.reshape(out.shape[0], heads, queries, out.shape[-1]).swapaxes(1, 2)


def in_blocks(queries: int, keys: int) -> bool:
    """Whether `attention` works in blocks of keys."""
    return keys > KEYS_AT_ONCE and queries > FEW_QUERIES


def attention_weights(query: Float[Array, "B T H K"], key: Float[Array, "B S G K"], *, causal: bool = False,
                      mask: Bool[Array, "B #H #T S"] | None = None, lengths: Int[Array, "B"] | None = None, visibility: Visibility | None = None,
                      bias: Float[Array, "#B #H #T #S"] | None = None, soft_cap: float | None = None,
                      scale: float | None = None) -> Float[Array, "B H T S"]:
    """The weights that `attention` applies, in float32, for analyses and pictures; rows sum to 1, or to 0 where no key may be read."""
    (batch, queries, heads, _), (_, keys, groups, _) = query.shape, key.shape
    allowed = regroup(_masks(queries, keys, causal, mask, lengths, visibility).allowed(jnp.arange(keys)), heads, groups)
    query, bias, options = _prepare(query, groups, bias, soft_cap, scale, "float32")
    weights, total = exponentials(query, key.swapaxes(1, 2), allowed, bias, *options)
    return (weights / total).reshape(batch, heads, queries, keys)


def _prepare(query, groups, bias, soft_cap, scale, softmax_dtype):
    """Queries and bias with grouped heads, and (scale, soft_cap, softmax_dtype) as Python values."""
    heads = query.shape[2]
    if groups < 1 or heads % groups:
        raise ConfigError(f"attention: {groups} key and value heads do not divide the {heads} query heads; choose num_kv_heads that do.")
    whole = not isinstance(bias, RelativeBias)
    if whole and bias is not None and bias.ndim != 4:
        raise ValueError(f"attention: the bias has shape {bias.shape}; give it four axes, [batch, heads, queries, keys], of size 1 where shared.")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = float(scale), None if soft_cap is None else float(soft_cap), jnp.dtype(softmax_dtype)
    query = query.swapaxes(1, 2)
    if groups != heads:
        query = query.reshape(query.shape[0], groups, heads // groups, *query.shape[2:])
    return query, regroup(bias, heads, groups) if whole else bias, options


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(query, key, value, allowed, bias, scale, soft_cap, softmax_dtype):
    return _attend_forward(query, key, value, allowed, bias, scale, soft_cap, softmax_dtype)[0]


def _attend_forward(query, key, value, allowed, bias, scale, soft_cap, softmax_dtype):
    weights, total = exponentials(query, key, allowed, bias, scale, soft_cap, softmax_dtype)
    weights = weights.astype(value.dtype)
    # The sum divides the small product, not the large weights.
    out = (product("bgrts,bgsk->bgrtk", weights, value, softmax_dtype) / total).astype(value.dtype)
    out = checkpoint_name(out, "mixed")   # here, since the backward pass reads it
    return out, (query, key, value, bias, weights, total, out)


def _attend_backward(scale, soft_cap, softmax_dtype, saved, gradient):
    query, key, value, bias, weights, total, out = saved
    divided = gradient.astype(softmax_dtype) / total
    # sum_s p (dp) over the keys equals the inner product of the output and its gradient: a pass over [T, K] instead of [T, S].
    shared = (divided * out.astype(softmax_dtype)).sum(-1, keepdims=True)
    divided = divided.astype(value.dtype)
    d_value = product("bgrts,bgrtk->bgsk", weights, divided)
    d_weights = product("bgrtk,bgsk->bgrts", divided, value, softmax_dtype)
    d_logits = weights.astype(softmax_dtype) * (d_weights - shared)
    d_bias = None if bias is None else sum_to(d_logits, bias.shape).astype(bias.dtype)
    if soft_cap is not None:
        d_logits = d_logits * capped(query, key, scale, soft_cap, softmax_dtype)[1]
    d_logits = (d_logits * scale).astype(query.dtype)
    d_query = product("bgrts,bgsk->bgrtk", d_logits, key)
    d_key = product("bgrts,bgrtk->bgsk", d_logits, query)
    return d_query, d_key, d_value, None, d_bias


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
        return Linear(width, contract=2, kernel_init=self.out_init, out_dtype=added_dtype(self.dtype, "heads"), name="out", **options)(mixed)


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
