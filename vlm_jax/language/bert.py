"""BERT: an encoder of text, with its pooler and its head for masked tokens. Devlin et al., "BERT" (2019), section 3 and appendix A."""
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError
from vlm_jax.language.embeddings import Head, clean, look_up, read_inputs, visibility_of
from vlm_jax.language.transformer import BlockSettings, Transformer
from vlm_jax.nn import ACTIVATIONS, Dropout, Linear, initializer, norm
from vlm_jax.nn.precision import wide
from vlm_jax.settings import choose
from vlm_jax.sharding.activations import constrain

INPUTS = ("tokens", "embeddings", "valid", "positions", "segment_ids", "types")
BIASES = ("query", "key", "value", "out", "up", "down")
STD = 0.02   # of all tables, as the paper's code has it


class Bert(nn.Module):
    """A transformer with norms after the sums that reads both ways.

    Parameters: `token_embedding`, `position_embedding`, `type_embedding`, `norm_embedding`, `blocks`, and where asked for `pooler` and `mlm_dense`, `mlm_norm`,
    `head/bias` (the head's kernel is the token table).

    Attributes:
      vocab_size, type_vocab_size, max_positions, width, depth, mlp_dim, num_heads: sizes.
      pooler: whether the first token passes a layer with tanh, which classifiers read.
      mlm_head: whether the output is logits of the tokens.
      dropout: of embeddings, of what attention and MLP add, and in the MLP.
      scan, remat: see `nn.Stack`.
    """
    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    type_vocab_size: int = 2
    max_positions: int = 512
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pooler: bool = True
    mlm_head: bool = False
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def block_settings(self) -> BlockSettings:
        """The settings of its blocks."""
        return BlockSettings(
            self.width, self.depth, self.mlp_dim, self.num_heads, norm="layer", norm_eps=self.norm_eps, norm_place="post", activation=self.activation,
            gated=False, biases=BIASES, dropout=self.dropout, dtype=self.dtype, param_dtype=self.param_dtype, softmax_dtype=self.softmax_dtype)

    @nn.compact
    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Float[Array, "B T W"], dict[str, Any]]:
        """Reads texts.

        Args:
          inputs: "tokens" [B, T] or, in their place, "embeddings" [B, T, D], and where there is need "valid" [B, T], "types" [B, T] (which of two texts a token
            is of; 0), "positions" (by default the places in the row, padding included, as the published code counts) and "segment_ids".
          train: whether dropout is active.
        Returns:
          the hidden states [B, T, D], or with `mlm_head` logits [B, T, V] float32; and {"hidden": the states, "pooled" [B, D] with `pooler`, "scored": what the
          head reads, with `mlm_head`, "blocks": intermediates of the blocks}. An id beyond the vocabulary gives NaN.
        Raises:
          ConfigError: for inputs that do not fit the model or each other.
        """
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        unrounded = dict(options, out_dtype=wide(self.dtype))
        valid, order = read_inputs(inputs, INPUTS, "Bert", self.width)
        length = valid.shape[1]
        places = inputs.get("positions")
        places = jnp.broadcast_to(jnp.arange(length), valid.shape) if places is None else places
        if inputs.get("positions") is None and length > self.max_positions:
            raise ConfigError(f"Bert: {length} tokens, but the model has {self.max_positions} positions; shorten the text.")

        def table(name: str, size: int) -> Float[Array, "N D"]:
            return self.param(name, initializer(STD), (size, self.width), jnp.dtype(self.param_dtype))

        tokens = table("token_embedding", self.vocab_size)
        x = inputs.get("embeddings")
        x = look_up(tokens, inputs["tokens"], self.dtype) if x is None else x.astype(wide(self.dtype))
        types = inputs.get("types")
        x = x + look_up(table("type_embedding", self.type_vocab_size), jnp.zeros_like(places) if types is None else types, self.dtype)
        x = clean(x + look_up(table("position_embedding", self.max_positions), places, self.dtype), valid)
        x = norm("layer", self.norm_eps, name="norm_embedding", dtype=wide(self.dtype), param_dtype=self.param_dtype)(x)
        x = constrain(Dropout(self.dropout)(x, train), "batch", "sequence", "embed")

        transformer = Transformer(self.block_settings(), self.depth, final_norm=False, scan=self.scan, remat=self.remat)
        nn.share_scope(self, transformer)
        x, blocks = transformer(x, visibility_of(order, inputs, causal=False), order, train=train)
        out = {"hidden": x, "blocks": blocks["blocks"]}
        if self.pooler:
            out["pooled"] = jnp.tanh(Linear(self.width, kernel_init=STD, name="pooler", **unrounded)(x[:, 0]))
        if not self.mlm_head:
            return x, out
        x = choose(ACTIVATIONS, self.activation, "activation")(Linear(self.width, kernel_init=STD, name="mlm_dense", **unrounded)(x))
        out["scored"] = x = norm("layer", self.norm_eps, name="mlm_norm", **options)(x)
        return Head(self.vocab_size, True, name="head", **options)(x, tokens), out

    def head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """{"kernel", "tied", "bias", "soft_cap"} of the parameters, as `losses.vocabulary_loss` takes them beside "scored"."""
        return dict(kernel=params["token_embedding"], tied=True, bias=params["head"]["bias"], soft_cap=None)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"tokens": (T,)} of one example; any length up to `max_positions` will do."""
        self.block_settings()
        return {"tokens": (min(16, self.max_positions),)}
