"""Encoder-decoder language models: T5 (Raffel et al. 2020), T5 1.1 and FLAN-T5, mT5 (Xue et al. 2021), UMT5 (Chung et al. 2023).

Both stacks know order by relative positions in buckets; their layers add a bias to the logits of attention, and nothing to the embeddings.
"""
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.language.embeddings import Head, clean, look_up, read_inputs, visibility_of
from vlm_jax.language.transformer import BlockSettings, Transformer, relative_settings
from vlm_jax.nn import Dropout, initializer
from vlm_jax.nn.cache import Cache
from vlm_jax.nn.linear import effective
from vlm_jax.nn.precision import wide
from vlm_jax.nn.visibility import Visibility, positions_of
from vlm_jax.settings import call
from vlm_jax.sharding.activations import constrain

INPUTS = ("tokens", "embeddings", "valid", "positions", "targets", "target_valid")


class EncoderDecoder(nn.Module):
    """An encoder that reads both ways and a causal decoder that reads it, with one token table.

    Attributes:
      vocab_size, width, encoder_depth, decoder_depth, mlp_dim, num_heads, head_dim: sizes.
      norm, norm_eps, activation, gated: see `Decoder`.
      relative: settings of relative positions: `buckets` (32) and `max_distance` (128) beyond which all are one bucket; `shared` (True): one table for all
        layers of a stack, else one a layer; `encoder` (True): whether the encoder has any.
      attention_scale: T5 does not scale the products of queries and keys.
      tied: the head is the token table. head_scale: what the head reads is multiplied by it (T5: width^-1/2).
      start_id: the token that the decoder begins with.
      dropout: of embeddings, of what attention and MLP add, in the MLP, and after the stacks.
      scan, remat: see `nn.Stack`.
    """
    vocab_size: int
    width: int
    encoder_depth: int
    decoder_depth: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    relative: Mapping[str, Any] | None = None
    attention_scale: float = 1.0
    tied: bool = True
    head_scale: float | None = None
    start_id: int = 0
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "relative", FrozenDict(self.relative or {}))
        super().__post_init__()

    def setup(self):
        self.encoder = self._stack("encoder", name="encoder")
        self.decoder = self._stack("decoder", name="decoder")
        std = 1.0 if self.head_scale is not None or not self.tied else self.width ** -0.5
        self.token_embedding = self.param("token_embedding", initializer(std), (self.vocab_size, self.width), jnp.dtype(self.param_dtype))
        self.output_head = Head(self.vocab_size, dtype=self.dtype, param_dtype=self.param_dtype, name="head")
        self.embedding_dropout = Dropout(self.dropout)

    def block_settings(self, which: str) -> BlockSettings:
        """The settings of the blocks of "encoder" or "decoder"."""
        return BlockSettings(
            self.width, getattr(self, f"{which}_depth"), self.mlp_dim, self.num_heads, head_dim=self.head_dim, norm=self.norm, norm_eps=self.norm_eps,
            activation=self.activation, gated=self.gated, attention_scale=self.attention_scale, cross=which == "decoder", dropout=self.dropout,
            dtype=self.dtype, param_dtype=self.param_dtype, softmax_dtype=self.softmax_dtype)

    def _stack(self, which: str, **given: Any) -> Transformer:
        settings = self.block_settings(which)
        relative = call(relative_settings, self.relative, "model.relative")
        positions = "relative" if which == "decoder" or relative["encoder"] else "none"
        relative = FrozenDict(relative, bidirectional=which == "encoder")
        return Transformer(settings, settings.depth, positions, relative=relative, scan=self.scan, remat=self.remat, **given)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of tokens as `inputs["embeddings"]` takes them. An id beyond the vocabulary gives NaN."""
        return constrain(look_up(self.token_embedding, tokens, self.dtype), "batch", "sequence", "embed")

    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Predicts each target from those before it and all of the input.

        Args:
          inputs: "tokens" [B, M] or "embeddings" [B, M, D] that the encoder reads (where both are given, the embeddings), "targets" [B, T], and where there is
            need "valid" [B, M], "positions" [B, M], "target_valid" [B, T].
          train: whether dropout is active.
        Returns:
          logits [B, T, V] float32, of targets 0 .. T - 1, and {"hidden": what the head reads [B, T, D], "encoded": states of the encoder [B, M, D],
          "encoder", "decoder": intermediates of the blocks, each with a leading layer axis}.
        Raises:
          ConfigError: for inputs that do not fit the model or each other.
        """
        if inputs.get("targets") is None:
            raise ConfigError('EncoderDecoder: inputs["targets"] [B, T] are missing; give them, or call start() to generate.')
        encoded, of_encoder = self.encode(inputs, train)
        targets = inputs["targets"]
        valid = inputs.get("target_valid")
        valid = jnp.ones(targets.shape, bool) if valid is None else valid.astype(bool)
        if targets.ndim != 2 or valid.shape != targets.shape or len(targets) != len(encoded[0]):
            raise ConfigError(f"EncoderDecoder: targets {targets.shape} and target_valid {valid.shape} do not fit {len(encoded[0])} rows of input; give "
                              "[B, T] of the same rows.")
        # The decoder reads the targets shifted right, the start token before them.
        tokens = jnp.concatenate([jnp.full_like(targets[:, :1], self.start_id), targets[:, :-1]], axis=1)
        valid = jnp.concatenate([jnp.ones_like(valid[:, :1]), valid[:, :-1]], axis=1)
        positions = positions_of(valid)
        x = self.embedding_dropout(clean(self.embed(tokens), valid), train)
        x, out = self.decoder(x, visibility_of(positions), positions, encoded=encoded, train=train)
        hidden = self._hidden(x, train)
        return self._logits(hidden), {"hidden": hidden, "encoded": encoded[0], "encoder": of_encoder, "decoder": out["blocks"]}

    def encode(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[tuple[Float[Array, "B M D"], Bool[Array, "B M"]], dict[str, Any]]:
        """Runs the encoder; returns (its states, which of them are valid), and the intermediates of its blocks."""
        valid, positions = read_inputs(inputs, INPUTS, "EncoderDecoder", self.width)
        x = inputs.get("embeddings")
        x = self.embed(inputs["tokens"]) if x is None else x.astype(wide(self.dtype))
        x = self.embedding_dropout(clean(x, valid), train)
        x, out = self.encoder(x, visibility_of(positions, causal=False), positions, train=train)
        return (self.embedding_dropout(x, train).astype(self.dtype), valid), out["blocks"]

    def start(self, inputs: Mapping[str, Array], cache_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Encodes, and decodes the start token.

        Args:
          inputs: as of `__call__`, without targets.
          cache_length: how many tokens of the answer the cache can hold, the start token included.
        Returns:
          logits [B, V] of the first token of the answer, and the cache, which holds keys and values of the encoder for every layer.
        """
        encoded, _ = self.encode(inputs)
        rows = encoded[0].shape[0]
        cache = Cache.create(self.decoder_depth, rows, cache_length, self.num_heads, self.head_dim, self.dtype)
        cache, slots = cache.extend(jnp.ones((rows, 1), bool), fresh=True)
        x = self.embed(jnp.full((rows, 1), self.start_id, jnp.int32))
        x, out = self.decoder(x, visibility_of(slots.position), slots.position, cache, slots, encoded)
        return self._logits(self._hidden(x))[:, 0], out["cache"]

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Reads further tokens of the answers; see `Decoder.extend`."""
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid.astype(bool)
        cache, slots = cache.extend(valid)
        x = clean(self.embed(tokens), valid)
        x, out = self.decoder(x, Visibility(slots.position, slots.key_position), slots.position, cache, slots)
        return self._logits(self._hidden(x)), out["cache"]

    def head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """{"kernel", "tied", "bias", "soft_cap"} of the parameters, as `losses.vocabulary_loss` takes them beside "hidden"."""
        return dict(kernel=params["token_embedding"] if self.tied else effective(params["head"])["kernel"], tied=self.tied, bias=None, soft_cap=None)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"tokens": (M,), "targets": (T,)} of one example; any other lengths will do."""
        for which in ("encoder", "decoder"):
            self._stack(which, parent=None)   # finds settings that do not fit
        return {"tokens": (16,), "targets": (8,)}

    def _hidden(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        x = self.embedding_dropout(x, train)
        x = x if self.head_scale is None else x * jnp.asarray(self.head_scale, x.dtype)
        return x.astype(self.dtype)

    def _logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.output_head(hidden, self.token_embedding if self.tied else None)
