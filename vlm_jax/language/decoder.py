"""Decoder-only language models: one transformer with the differences of the published families as settings.

GPT-2 (Radford et al. 2019), OPT (Zhang et al. 2022), GPT-NeoX (Black et al. 2022), Llama (Touvron et al. 2023), Mistral, Gemma, Qwen, Phi, MPT:
`language/presets.py` has their sizes.
"""
from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.language.embeddings import Head, clean, look_up, read_inputs, tied_logits, visibility_of
from vlm_jax.language.transformer import BlockSettings, Transformer, check_rope
from vlm_jax.nn import Dropout, Linear, initializer
from vlm_jax.nn.cache import Cache
from vlm_jax.nn.linear import effective
from vlm_jax.nn.precision import wide
from vlm_jax.nn.stack import Inserted
from vlm_jax.nn.visibility import Visibility
from vlm_jax.settings import choose
from vlm_jax.sharding.activations import constrain

POSITIONS = ("rope", "learned", "alibi", "none")
KERNELS = ("query", "key", "value", "out", "gate", "up", "down", "head")
INPUTS = ("tokens", "embeddings", "valid", "positions", "prefix", "segment_ids")


class Decoder(nn.Module):
    """A causal transformer over tokens (or embeddings), with a head over the vocabulary.

    Attributes:
      vocab_size, width, depth, mlp_dim, num_heads: sizes. head_dim is width / num_heads unless given; num_kv_heads (which must divide num_heads) is num_heads.
      norm: "rms", "rms_plus_one" (the scale is stored minus one), "layer", "layer_no_bias" or "layer_plain" (no parameters), with `norm_eps`.
      norm_place: "pre"; "post" (after the sum); "both" (before, and after what is added).
      parallel: attention and MLP read the same x; with `shared_norm` by one norm, else each by its own.
      final_norm: whether a norm comes before the head.
      activation: of the MLP, multiplied by a second projection where `gated`.
      biases: names of the kernels that have one, of `KERNELS`.
      positions: "rope" (see `rope`), "learned" (a table of max_positions + position_offset rows; position p is row p + position_offset), "alibi" or "none".
      rope: settings of `nn.rotary`: theta, fraction (of each head that is rotated), scaling, and local_theta, local_scaling of the layers in a window.
      qk_norm: None, or the kind of norm that queries and keys pass head by head; with `qk_norm_whole` all heads together (MPT-1B).
      attention_scale: of the products of queries and keys, head_dim^-1/2 unless given; a tuple has one for each layer.
      attention_soft_cap, logits_soft_cap: c makes c tanh(x / c) of them.
      clip_qkv: queries, keys and values are cut to [-clip_qkv, clip_qkv].
      window: positions that a token sees, itself included, in the layers that the repeating pattern `windowed` says; None: all.
      embed_dim: width of the token table and the head, with a projection to `width` and one back (OPT-350M).
      embed_scale: embeddings are multiplied by it.
      new_tokens: ids from vocab_size on, with embeddings (and columns of the head, where it is not tied) of their own, `new_embedding` and `new_head`:
        what a frozen model learns besides, and what IDEFICS stores apart.
      tied: the head is the token table.
      dropout: of embeddings, of what attention and MLP add, and in the MLP.
      scan, remat: see `nn.Stack`.
    """
    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_place: str = "pre"
    parallel: bool = False
    shared_norm: bool = False
    final_norm: bool = True
    activation: str = "silu"
    gated: bool = True
    biases: tuple[str, ...] = ()
    positions: str = "rope"
    max_positions: int = 2048
    position_offset: int = 0
    rope: Mapping[str, Any] | None = None
    qk_norm: str | None = None
    qk_norm_whole: bool = False
    attention_scale: float | tuple[float, ...] | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    clip_qkv: float | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = (True,)
    embed_dim: int | None = None
    embed_scale: float | None = None
    new_tokens: int = 0
    tied: bool = True
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        # Frozen settings make models hashable and comparable, as static arguments of jit must be.
        object.__setattr__(self, "rope", FrozenDict(self.rope or {}))
        object.__setattr__(self, "biases", tuple(self.biases))
        object.__setattr__(self, "windowed", tuple(self.windowed))
        if isinstance(self.attention_scale, list):
            object.__setattr__(self, "attention_scale", tuple(self.attention_scale))
        super().__post_init__()

    def setup(self):
        self.check()
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.transformer = Transformer(
            self.block_settings(), self.depth, "none" if self.positions == "learned" else self.positions, rope=self.rope,
            window=self.window, windowed=self.windowed, final_norm=self.final_norm, scan=self.scan, remat=self.remat)
        nn.share_scope(self, self.transformer)
        width = self.embed_dim or self.width
        self.token_embedding = self.param("token_embedding", initializer(width ** -0.5), (self.vocab_size, width), jnp.dtype(self.param_dtype))
        if self.positions == "learned":
            rows = self.max_positions + self.position_offset
            self.position_embedding = self.param("position_embedding", initializer(0.02), (rows, self.width), jnp.dtype(self.param_dtype))
        if width != self.width:
            self.project_in = Linear(self.width, use_bias=False, kernel_init="lecun_normal", out_dtype=wide(self.dtype), **options)
            self.project_out = Linear(width, use_bias=False, kernel_init="lecun_normal", **options)
        self.output_head = Head(self.vocab_size, "head" in self.biases, self.logits_soft_cap, name="head", **options)
        if self.new_tokens:
            self.new_embedding = self.param("new_embedding", initializer(width ** -0.5), (self.new_tokens, width), jnp.dtype(self.param_dtype))
            if not self.tied:
                self.new_output = Head(self.new_tokens, False, self.logits_soft_cap, name="new_head", **options)
        self.embedding_dropout = Dropout(self.dropout)

    def block_settings(self) -> BlockSettings:
        """The settings of its blocks."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockSettings) if hasattr(self, field.name)}
        return BlockSettings(**own)

    def check(self) -> None:
        """Raises a ConfigError for settings that do not fit each other."""
        settings = self.block_settings()
        if self.positions not in POSITIONS:
            raise ConfigError(f'positions: "{self.positions}" is unknown; choose one of {", ".join(POSITIONS)}.')
        if self.positions == "rope":
            check_rope(self.rope, settings.head_size)
        for name in self.biases:
            choose(dict.fromkeys(KERNELS), name, "biases")
        if not self.windowed or (self.window is not None and self.window < 1):
            raise ConfigError(f"window: {self.window} of the layers {self.windowed}; choose a positive number and a pattern of at least one layer, or None.")

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of tokens as `inputs["embeddings"]` takes them: scaled and projected, without positions. An id beyond the vocabulary gives NaN."""
        x = look_up(self.token_embedding, tokens, self.dtype)
        if self.new_tokens:
            x = jnp.where((tokens >= self.vocab_size)[..., None], look_up(self.new_embedding, tokens - self.vocab_size, self.dtype), x)
        if self.embed_dim not in (None, self.width):
            x = self.project_in(x)
        if self.embed_scale is not None:
            x = x * jnp.asarray(self.embed_scale, x.dtype)
        return constrain(x, "batch", "sequence", "embed")

    def __call__(self, inputs: Mapping[str, Array], train: bool = False,
                 inserted: Inserted | None = None) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Predicts the token after each.

        Args:
          inputs: "tokens" [B, T] or, in their place, "embeddings" [B, T, D] (see `embed`), and where there is need "valid" [B, T] (False is padding,
            anywhere in a row), "positions" (by default valid tokens are counted, in each segment anew), "prefix" [B, T] (tokens that all of their row
            read), "segment_ids" [B, T] (documents of one row, one after the other, that do not see each other).
          train: whether dropout is active.
          inserted: blocks of others between the layers, see `nn.Stack`.
        Returns:
          logits [B, T, V] float32, those of new tokens last, and {"hidden": what the head reads [B, T, D], "blocks": intermediates of the blocks, each with a
          leading layer axis}.
        Raises:
          ConfigError: for inputs that do not fit the model or each other.
        """
        x, valid, positions = self._read(inputs, train)
        visibility = visibility_of(positions, inputs)
        x, out = self.transformer(x, visibility, positions, train=train, inserted=inserted)
        hidden = self._hidden(x)
        return self._logits(hidden), {"hidden": hidden, "blocks": out["blocks"]}

    def start(self, inputs: Mapping[str, Array], cache_length: int, inserted: Inserted | None = None) -> tuple[Float[Array, "B V"], Cache]:
        """Reads a prompt.

        Args:
          inputs: as of `__call__`.
          cache_length: how many tokens the cache can hold, those to come included.
          inserted: as of `__call__`.
        Returns:
          logits [B, V] of what comes after the last valid token of each row, and the cache to go on with.
        Raises:
          ConfigError: if the prompt is longer than the cache.
        """
        x, valid, positions = self._read(inputs)
        s = self.block_settings()
        # With a window in all layers the slots of a cache may be taken round and round.
        ring = all(self.transformer.window_pattern()) and cache_length >= self.window
        cache = Cache.create(self.depth, len(x), cache_length, s.groups, s.head_size, self.dtype, ring=ring)
        cache, slots = cache.extend(valid, positions, fresh=True)
        visibility = visibility_of(positions, inputs)
        x, out = self.transformer(x, visibility, positions, cache, slots, inserted=inserted)
        last = jnp.argmax(jnp.where(valid, jnp.arange(x.shape[1]), -1), axis=1)
        hidden = self._hidden(jnp.take_along_axis(x, last[:, None, None], axis=1))
        return self._logits(hidden)[:, 0], out["cache"]

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None,
               embeddings: Float[Array, "B T D"] | None = None, inserted: Inserted | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Reads further tokens of each row.

        Args:
          valid: False where a row has no token here; it writes nothing.
          embeddings: in the place of those of the tokens, see `embed`.
          inserted: as of `__call__`.
        Returns:
          logits [B, T, V] of what comes after each token, and the cache that holds them too.
        """
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid.astype(bool)
        cache, slots = cache.extend(valid)
        x = self.embed(tokens) if embeddings is None else embeddings.astype(wide(self.dtype))
        x = self._positioned(x, valid, slots.position)
        x, out = self.transformer(x, Visibility(slots.position, slots.key_position), slots.position, cache, slots, inserted=inserted)
        return self._logits(self._hidden(x)), out["cache"]

    def head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """{"kernel", "tied", "bias", "soft_cap"} of the parameters, as `losses.vocabulary_loss` takes them beside "hidden"."""
        own = effective(params.get("head", {}))
        kernel, bias = params["token_embedding"] if self.tied else own["kernel"], own.get("bias")
        if self.new_tokens:
            new = params["new_embedding"] if self.tied else effective(params["new_head"])["kernel"]
            # A sum, because joining them would exchange the whole table where a mesh splits the vocabulary; padding moves the edges of the parts alone.
            before, after = ((0, 0), (self.vocab_size, 0)), ((0, 0), (0, self.new_tokens))
            (of_new, of_kernel) = (pads[::-1] if self.tied else pads for pads in (before, after))
            kernel = jnp.pad(kernel, of_kernel) + jnp.pad(new.astype(kernel.dtype), of_new)
            bias = None if bias is None else jnp.pad(bias, (0, self.new_tokens))
        return dict(kernel=kernel, tied=self.tied, bias=bias, soft_cap=self.logits_soft_cap)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"tokens": (T,)} of one example; any other length will do."""
        self.check()
        return {"tokens": (min(16, self.max_positions),)}

    def _read(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Array, Array, Array]:
        """(embeddings with positions, valid, positions) of the inputs."""
        valid, positions = read_inputs(inputs, INPUTS, "Decoder", self.width)
        if self.positions == "learned" and inputs.get("positions") is None and valid.shape[1] > self.max_positions and "valid" not in inputs:
            raise ConfigError(f"Decoder: {valid.shape[1]} tokens, but the model has {self.max_positions} positions; shorten the text.")
        x = inputs.get("embeddings")
        x = self.embed(inputs["tokens"]) if x is None else x.astype(wide(self.dtype))
        return self.embedding_dropout(self._positioned(x, valid, positions), train), valid, positions

    def _positioned(self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.positions == "learned":
            x = x + look_up(self.position_embedding, jnp.maximum(positions, 0) + self.position_offset, self.dtype)
        return clean(x, valid)

    def _hidden(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        return x.astype(self.dtype) if self.embed_dim in (None, self.width) else self.project_out(x)

    def _logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        logits = self.output_head(hidden, self.token_embedding if self.tied else None)
        if not self.new_tokens:
            return logits
        new = tied_logits(hidden, self.new_embedding, self.logits_soft_cap) if self.tied else self.new_output(hidden)
        return constrain(jnp.concatenate([logits, new], axis=-1), "batch", "sequence", "vocab")
