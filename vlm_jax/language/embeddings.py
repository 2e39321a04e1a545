"""What stands at both ends of a language model: tokens become vectors and positions, vectors become logits."""
from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen as nn
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.precision import wide
from vlm_jax.nn.visibility import Visibility
from vlm_jax.sharding.activations import constrain


def look_up(table: Float[Array, "V D"], ids: Int[Array, "..."], dtype: str) -> Float[Array, "... D"]:
    """Rows of a table, rounded to `dtype` as kernels are, in the dtype of sums (`nn.precision.wide`); an id that the table does not have gives NaN, never
    another id's row."""
    ids = jnp.where(ids < 0, table.shape[0], ids)   # a negative index would count from the end
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype).astype(wide(dtype))


def token_positions(valid: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None,
                    positions: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """Positions of the tokens of each row, -1 at padding.

    Args:
      valid: False at padding, which may be left, right or between.
      segment_ids: documents that lie one after the other in a row; each counts from 0.
      positions: given ones; by default the valid tokens are counted.
    """
    if positions is None:
        after = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        positions = after - 1
        if segment_ids is not None:
            begins = jnp.concatenate([jnp.ones_like(valid[:, :1]), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
            positions -= lax.cummax(jnp.where(begins, after - valid, 0), axis=1)
    return jnp.where(valid, positions.astype(jnp.int32), -1)


def read_inputs(inputs: Mapping[str, Any], known: Iterable[str], where: str, width: int) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """Checks the inputs of a model and returns (valid, positions) of its tokens, or of the embeddings in their place.

    Raises:
      ConfigError: for an entry that is not `known`, neither tokens nor embeddings, or shapes that differ.
    """
    for name in inputs:
        if name not in known:
            raise ConfigError(f'{where}: inputs["{name}"] is unknown; it reads {", ".join(known)}.{did_you_mean(name, known)}')
    main = "tokens" if inputs.get("embeddings") is None else "embeddings"
    if inputs.get(main) is None:
        raise ConfigError(f'{where}: the inputs hold {", ".join(sorted(inputs)) or "nothing"}; give "tokens" [B, T] or "embeddings" [B, T, {width}].')
    array = inputs[main]
    if array.ndim != (2 if main == "tokens" else 3) or (main == "embeddings" and array.shape[2] != width):
        raise ConfigError(f'{where}: inputs["{main}"] has shape {array.shape}; give {"[B, T]" if main == "tokens" else f"[B, T, {width}]"}.')
    shape = array.shape[:2]
    for name in ("tokens", "valid", "positions", "prefix", "segment_ids", "types"):
        if inputs.get(name) is not None and inputs[name].shape != shape:
            raise ConfigError(f'{where}: inputs["{name}"] has shape {inputs[name].shape} for {main} {array.shape}; give one entry for each token.')
    valid = inputs.get("valid")
    valid = jnp.ones(shape, bool) if valid is None else valid.astype(bool)
    return valid, token_positions(valid, inputs.get("segment_ids"), inputs.get("positions"))


def visibility_of(positions: Int[Array, "B T"], inputs: Mapping[str, Any] | None = None, *, causal: bool = True) -> Visibility:
    """What tokens may read of each other: of their "segment_ids", and with those of the "prefix" whatever the order, where `inputs` have these.

    Tokens of the prefix see each other beyond a window too, as transformers computes PaliGemma 2. Where `inputs` are those that `token_positions` counted
    the positions of, their layout is known.
    """
    layout = None
    if inputs is not None and inputs.get("positions") is None:
        layout = "full" if inputs.get("valid") is None else "ordered"
    inputs = inputs or {}
    segment_ids, prefix = inputs.get("segment_ids"), inputs.get("prefix")
    prefix = None if prefix is None else prefix.astype(bool)
    return Visibility(positions, positions, segment_ids, segment_ids, prefix, causal=causal, query_prefix=prefix, layout=layout)


def clean(x: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
    """x with zeros at padding, whose ids may be anything."""
    return jnp.where(valid[..., None], x, jnp.zeros_like(x))


class Head(nn.Module):
    """Logits [B, T, V] in float32: hidden @ kernel, or with a `table` of embeddings (tied) hidden @ table^T; plus a bias, then the soft cap.

    The product is taken in the dtype of `hidden` and summed in float32, as `losses.vocabulary_loss` does.
    """
    vocab_size: int
    use_bias: bool = False
    soft_cap: float | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Float[Array, "B T D"], table: Float[Array, "V D"] | None = None) -> Float[Array, "B T V"]:
        if table is None:
            linear = Linear(self.vocab_size, use_bias=self.use_bias, kernel_init="lecun_normal", dtype=self.dtype, param_dtype=self.param_dtype,
                            out_dtype="float32", name="linear")
            nn.share_scope(self, linear)
            logits = linear(hidden)
        else:
            logits = tied_logits(hidden, table)
            if self.use_bias:
                logits += self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.dtype(self.param_dtype)).astype(jnp.float32)
        return constrain(_capped(logits, self.soft_cap), "batch", "sequence", "vocab")


def tied_logits(hidden: Float[Array, "B T D"], table: Float[Array, "V D"], soft_cap: float | None = None) -> Float[Array, "B T V"]:
    """hidden @ table^T in float32, capped."""
    return _capped(jnp.einsum("btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32), soft_cap)


def _capped(logits: Float[Array, "B T V"], soft_cap: float | None) -> Float[Array, "B T V"]:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
