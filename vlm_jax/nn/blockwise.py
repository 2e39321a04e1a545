"""The arithmetic of attention on grouped heads: masks, logits, exponentials, and the form that works in blocks of keys.

Queries are [B, G, R, T, K] here: R = H / G query heads share each of the G heads of keys and values [B, G, S, K], which are never repeated. Where R is 1 there
is no such axis: one batched matrix product is what backends are fastest at.
"""
import functools

from flax import struct
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vlm_jax.nn.biases import RelativeBias
from vlm_jax.nn.visibility import Visibility

BLOCK = 512   # keys that are read at once


@struct.dataclass
class Masks:
    """What keeps queries from reading keys; what is given holds together.

    Attributes:
      last_key: index of the last key that each query reads.
      mask: True where reading is allowed, four axes.
      lengths: the number of valid keys of each example.
      visibility: facts about positions.
    """
    last_key: Int[Array, "T"] | None = None
    mask: Bool[Array, "#B #H #T #S"] | None = None
    lengths: Int[Array, "B"] | None = None
    visibility: Visibility | None = None

    def allowed(self, keys: Int[Array, "S"]) -> Bool[Array, "#B #H #T S"] | None:
        """One mask over the keys of these indices (of which the other fields are); None where all may read all."""
        parts = []
        if self.last_key is not None:
            parts.append((self.last_key[:, None] >= keys[None, :])[None, None])
        if self.mask is not None:
            parts.append(self.mask)
        if self.lengths is not None:
            parts.append((keys[None, :] < jnp.asarray(self.lengths)[:, None])[:, None, None])
        if self.visibility is not None:
            parts.append(self.visibility.allowed())
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def block(self, start: Int[Array, ""], size: int) -> "Masks":
        """The masks of `size` keys from `start` on."""
        seen = self.visibility
        if seen is not None:
            part = functools.partial(_keys_of, start=start, size=size, axis=1)
            seen = seen.replace(key_position=part(seen.key_position), key_segment=part(seen.key_segment), key_prefix=part(seen.key_prefix))
        return self.replace(mask=_keys_of(self.mask, start, size, 3), visibility=seen)


def _keys_of(x, start, size, axis):
    """A slice of an axis of keys; of an axis of size 1, which is shared by all keys, itself."""
    return x if x is None or x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, size, axis)


def regroup(x: Array | None, heads: int, groups: int) -> Array | None:
    """[B, H or 1, T, S] as [B, G or 1, R or 1, T, S]; as it is where R = H / G is 1."""
    if x is None or heads == groups:
        return x
    return x[:, :, None] if x.shape[1] == 1 else x.reshape(x.shape[0], groups, heads // groups, *x.shape[2:])


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums the axes along which an array of `shape` was broadcast to that of x."""
    axes = tuple(axis for axis, (size, target) in enumerate(zip(x.shape, shape)) if target == 1 != size)
    return x.sum(axes, keepdims=True) if axes else x


def product(spec: str, x: Array, y: Array, dtype=None) -> Array:
    """An einsum of arrays with grouped heads, or, where no heads share keys, of arrays without the axis r."""
    if spec == "bgrtk,bgsk->bgrts" and x.ndim == 5 and x.shape[3] == 1:   # as rows of one matrix: with two such axes XLA would transpose all keys on CPUs
        return jnp.einsum("bgrk,bgsk->bgrs", x[:, :, :, 0], y, preferred_element_type=dtype)[:, :, :, None]
    return jnp.einsum(spec if max(x.ndim, y.ndim) == 5 else spec.replace("r", ""), x, y, preferred_element_type=dtype)


def capped(query, key, scale, soft_cap, dtype):
    """soft_cap tanh(scale query key^T / soft_cap), and its derivative by the scaled product."""
    t = jnp.tanh(product("bgrtk,bgsk->bgrts", query, key, dtype) * (scale / soft_cap))
    return soft_cap * t, 1.0 - t * t


def _logits(query, key, bias, scale, soft_cap, dtype):
    """The logits up to a factor, and the factor: the plain product is scaled only after its maximum is taken away."""
    if soft_cap is not None:
        logits, factor = capped(query, key, scale, soft_cap, dtype)[0], 1.0
    else:
        logits, factor = product("bgrtk,bgsk->bgrts", query, key, dtype), scale
    if bias is not None:
        logits, factor = (logits if factor == 1.0 else logits * factor) + bias.astype(dtype), 1.0
    return logits, factor


def exponentials(query, key, allowed, bias, scale, soft_cap, dtype):
    """exp(logits - their maximum) [B, G, R, T, S], 0 where not allowed, and its row sums (1 for empty rows)."""
    logits, factor = _logits(query, key, bias, scale, soft_cap, dtype)
    if allowed is not None:
        logits = jnp.where(allowed, logits, jnp.finfo(dtype).min)
    weights = jnp.exp((logits - logits.max(-1, keepdims=True)) * factor)
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0)
    total = weights.sum(-1, keepdims=True)
    return weights, jnp.where(total == 0, jnp.ones_like(total), total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_in_blocks(query, key, value, bias, masks, scale, soft_cap, dtype):
    """Attention that reads `BLOCK` keys at a time, with a running maximum and sum; its backward pass computes the weights of each block again. The bias is an
    array or a `RelativeBias`, of which each block makes its part."""
    return _forward(query, key, value, bias, masks, scale, soft_cap, dtype)[0]


def _blocks(keys):
    """(number, size) of the blocks, and a function number -> (start, indices, which of them no earlier block had): the last block overlaps the one
    before it rather than end beyond the keys."""
    size = min(BLOCK, keys)

    def at(number):
        start = jnp.minimum(number * size, keys - size)
        indices = start + jnp.arange(size)
        return start, indices, indices >= number * size
    return -(-keys // size), size, at


def _block_logits(query, key, bias, masks, start, size, indices, new, scale, soft_cap, dtype):
    key = lax.dynamic_slice_in_dim(key, start, size, 2)
    heads = key.shape[1] * (query.shape[2] if query.ndim == 5 else 1)
    bias = regroup(bias.of_keys(start, size).dense(), heads, key.shape[1]) if isinstance(bias, RelativeBias) else _keys_of(bias, start, size, -1)
    logits, factor = _logits(query, key, bias, scale, soft_cap, dtype)
    allowed = regroup(masks.block(start, size).allowed(indices), heads, key.shape[1])
    return logits, factor, new if allowed is None else allowed & new, key


def _forward(query, key, value, bias, masks, scale, soft_cap, dtype):
    count, size, at = _blocks(key.shape[2])
    lowest = jnp.finfo(dtype).min

    def read(carry, number):
        out, highest, total = carry
        start, indices, new = at(number)
        logits, factor, allowed, _ = _block_logits(query, key, bias, masks, start, size, indices, new, scale, soft_cap, dtype)
        logits = jnp.where(allowed, logits * factor, lowest)
        above = jnp.maximum(highest, logits.max(-1, keepdims=True))
        weights = jnp.where(allowed, jnp.exp(logits - above), 0)
        shrink = jnp.exp(highest - above)
        added = product("bgrts,bgsk->bgrtk", weights.astype(value.dtype), lax.dynamic_slice_in_dim(value, start, size, 2), dtype)
        return (out * shrink + added, above, total * shrink + weights.sum(-1, keepdims=True)), None

    rows = query.shape[:-1]
    begin = (jnp.zeros((*rows, value.shape[-1]), dtype), jnp.full((*rows, 1), lowest, dtype), jnp.zeros((*rows, 1), dtype))
    (out, highest, total), _ = lax.scan(read, begin, jnp.arange(count))
    empty = total == 0
    total = jnp.where(empty, jnp.ones_like(total), total)
    out = checkpoint_name((out / total).astype(value.dtype), "mixed")
    normaliser = checkpoint_name(jnp.where(empty, jnp.zeros_like(total), highest + jnp.log(total)), "mixed")   # log of the sum of exp(logits)
    return out, (query, key, value, bias, masks, out, normaliser)


def _backward(scale, soft_cap, dtype, saved, gradient):
    query, key, value, bias, masks, out, normaliser = saved
    count, size, at = _blocks(key.shape[2])
    wide = gradient.astype(dtype)
    shared = (wide * out.astype(dtype)).sum(-1, keepdims=True)
    gradient = gradient.astype(value.dtype)

    def read(carry, number):
        d_query, d_key, d_value, d_bias = carry
        start, indices, new = at(number)
        logits, factor, allowed, keys = _block_logits(query, key, bias, masks, start, size, indices, new, scale, soft_cap, dtype)
        values = lax.dynamic_slice_in_dim(value, start, size, 2)
        weights = jnp.where(allowed, jnp.exp(logits * factor - normaliser), 0)
        d_value = _add(d_value, product("bgrts,bgrtk->bgsk", weights.astype(value.dtype), gradient, dtype), start, 2)
        d_logits = weights * (product("bgrtk,bgsk->bgrts", gradient, values, dtype) - shared)
        if isinstance(bias, RelativeBias):
            of_dense = d_logits.reshape(d_logits.shape[0], -1, *d_logits.shape[-2:])    # its heads are not grouped
            d_bias = d_bias + bias.of_keys(start, size).gradient(of_dense)
        elif bias is not None:
            shape = (*bias.shape[:-1], 1 if bias.shape[-1] == 1 else size)
            d_bias = _add(d_bias, sum_to(d_logits, shape), 0 if bias.shape[-1] == 1 else start, -1)
        if soft_cap is not None:
            d_logits = d_logits * capped(query, keys, scale, soft_cap, dtype)[1]
        d_logits = (d_logits * scale).astype(query.dtype)
        d_query = d_query + product("bgrts,bgsk->bgrtk", d_logits, keys, dtype)
        d_key = _add(d_key, product("bgrts,bgrtk->bgsk", d_logits, query, dtype), start, 2)
        return (d_query, d_key, d_value, d_bias), None

    learned = bias.table if isinstance(bias, RelativeBias) else bias
    begin = tuple(None if x is None else jnp.zeros(x.shape, dtype) for x in (query, key, value, learned))
    (d_query, d_key, d_value, d_bias), _ = lax.scan(read, begin, jnp.arange(count))
    d_bias = None if bias is None else d_bias.astype(learned.dtype)
    if isinstance(bias, RelativeBias):
        d_bias = bias.replace(table=d_bias, query_position=None, key_position=None)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), d_bias, None


def _add(total, part, start, axis):
    """Adds `part` to the slice of `total` that begins at `start`."""
    return lax.dynamic_update_slice_in_dim(total, lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis) + part, start, axis)


attend_in_blocks.defvjp(_forward, _backward)
