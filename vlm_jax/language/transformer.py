"""The transformer of language models: blocks with the differences of the published families as settings, and a stack of them.

Vaswani et al., "Attention Is All You Need" (2017); Raffel et al., "T5" (2020) for relative positions; Su et al., "RoFormer" (2021) for rotary ones; Press et
al., "Train Short, Test Long" (2022) for ALiBi; Wang and Komatsuzaki, "GPT-J" (2021) for attention and MLP side by side.
"""
from collections.abc import Callable, Mapping
import dataclasses
from functools import partial
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.nn import ACTIVATIONS, NORMS, Dropout, Linear, Mlp, Stack, attention, initializer, norm
from vlm_jax.nn.attention import head_size, in_blocks, split_heads
from vlm_jax.nn.biases import RelativeBias, alibi, alibi_slopes
from vlm_jax.nn.cache import Cache, Slots
from vlm_jax.nn.linear import added_dtype
from vlm_jax.nn.precision import wide
from vlm_jax.nn.rotary import apply_rotary, check_rotary, rotary
from vlm_jax.nn.stack import Inserted
from vlm_jax.nn.visibility import Visibility
from vlm_jax.settings import call, choose
from vlm_jax.sharding.activations import constrain

NORM_PLACES = ("pre", "post", "both")


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """What a block is made of; the names are those of `Decoder`.

    Attributes:
      depth: of the stack: what blocks add starts smaller in deeper ones (Radford et al. 2019, section 2.3).
      cross: whether the block reads an encoder, between attention and MLP.
    """
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
    activation: str = "silu"
    gated: bool = True
    biases: tuple[str, ...] = ()
    qk_norm: str | None = None
    qk_norm_whole: bool = False
    attention_scale: float | tuple[float, ...] | None = None
    attention_soft_cap: float | None = None
    clip_qkv: float | None = None
    cross: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        choose(NORMS, self.norm, "norm")
        choose(ACTIVATIONS, self.activation, "activation")
        if self.qk_norm is not None:
            choose(NORMS, self.qk_norm, "qk_norm")
        if self.norm_place not in NORM_PLACES:
            raise ConfigError(f'norm_place: "{self.norm_place}" is unknown; choose one of {", ".join(NORM_PLACES)}.')
        if self.parallel and self.norm_place != "pre":
            raise ConfigError(f'parallel: attention and MLP read the same x before their sum; norm_place="{self.norm_place}" has no place there, choose "pre".')
        if self.shared_norm and not self.parallel:
            raise ConfigError("shared_norm: attention and MLP share a norm only where parallel=True.")
        if self.cross and (self.parallel or self.norm_place != "pre"):
            raise ConfigError('cross: cross-attention needs norm_place="pre" and parallel=False.')
        if isinstance(self.attention_scale, tuple) and len(self.attention_scale) != self.depth:
            raise ConfigError(f"attention_scale: {len(self.attention_scale)} numbers for {self.depth} layers; give one number, or one a layer.")
        if self.num_heads < 1 or self.groups < 1 or self.num_heads % self.groups:
            raise ConfigError(f"num_kv_heads: {self.groups} do not divide the {self.num_heads} heads; choose a divisor.")
        if self.head_dim is None:
            head_size(self.width, self.num_heads)

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def scale(self) -> float:
        """What multiplies the products of queries and keys (of the first layer, where each has its own)."""
        scale = self.attention_scale[0] if isinstance(self.attention_scale, tuple) else self.attention_scale
        return self.head_size ** -0.5 if scale is None else scale

    @property
    def options(self) -> dict[str, str]:
        """The dtypes, as parts whose output is rounded take them."""
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)


class LanguageAttention(nn.Module):
    """Attention with grouped queries: `query [D, H, K]`, `key`, `value [D, G, K]`, `out [H, K, D]`, and `query_norm`, `key_norm` over a head, or over all.

    Attributes:
      biases: names of the kernels that have one.
      rotated: whether `rotation` is for it.
    """
    settings: BlockSettings

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], visibility: Visibility, *, rotation: Any = None, bias: Float[Array, "#B H T S"] | RelativeBias | None = None,
                 source: Float[Array, "B M D"] | None = None, known: tuple[Array, Array] | None = None, factor: Float[Array, ""] | None = None,
                 write: Callable[[Array, Array], tuple[Array, Array]] | None = None) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Args:
          rotation: of queries and keys, see `nn.rotary`.
          bias: added to the logits.
          source: what keys and values are made of, instead of x.
          known: keys and values made before, instead of any.
          factor: of queries, where layers have scales of their own.
          write: puts new keys and values into a cache and returns those to read.
        Returns:
          what attention adds [B, T, D], and the keys and values [B, S, G, K] that it read.
        """
        s = self.settings

        def project(name: str, heads: int, of: Array, tokens: str) -> Array:
            # Products of queries and keys begin with a variance of one after `scale`, whatever it is.
            std = of.shape[-1] ** -0.5 * (s.head_size ** -0.5 / s.scale if name == "query" else 1.0)
            y = split_heads(Linear((heads, s.head_size), use_bias=name in s.biases, kernel_init=std, name=name, **s.options)(of), tokens)
            return y if s.clip_qkv is None else jnp.clip(y, -s.clip_qkv, s.clip_qkv)

        def finished(name: str, y: Array) -> Array:
            # Rounded once, after norm, rotation and factor.
            if s.qk_norm is not None:
                heads = y.reshape(*y.shape[:-2], -1) if s.qk_norm_whole else y
                y = norm(s.qk_norm, s.norm_eps, dtype=wide(s.dtype), param_dtype=s.param_dtype, name=name)(heads).reshape(y.shape)
            y = y if rotation is None else apply_rotary(y, *rotation)
            return checkpoint_name(y.astype(s.dtype), "qkv")

        query = finished("query_norm", project("query", s.num_heads, x, "sequence"))
        query = query if factor is None else (query.astype(wide(s.dtype)) * factor).astype(s.dtype)
        if known is None:
            of = x if source is None else source
            known = finished("key_norm", project("key", s.groups, of, "keys")), checkpoint_name(project("value", s.groups, of, "keys"), "qkv")
            known = known if write is None else write(*known)
        mixed = attention(query, *known, visibility=visibility, bias=bias, soft_cap=s.attention_soft_cap, scale=s.scale, softmax_dtype=s.softmax_dtype)
        mixed = constrain(mixed, "batch", "sequence", "heads", "head_dim")
        std = (2 * s.depth * s.num_heads * s.head_size) ** -0.5
        return Linear(s.width, contract=2, use_bias="out" in s.biases, kernel_init=std, out_dtype=added_dtype(s.dtype, "heads"), name="out",
                      **s.options)(mixed), known


class LanguageBlock(nn.Module):
    """Attention, perhaps cross-attention, and an MLP, each added to x, with norms where `norm_place` says."""
    settings: BlockSettings

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], shared: Mapping[str, Any], *, per_layer: Mapping[str, Array] | None = None, state: Cache | None = None,
                 layer: Any = None, train: bool = False) -> tuple:
        """Args:
          shared: what all blocks get: "visibility", and perhaps "rotations" (of all layers, and of those in a window), "bias", "encoded" (states
            of an encoder), "cross" (the visibility of its keys), "slots" (of the tokens in the cache).
          per_layer: what this block gets: perhaps "window", "windowed", "relative_bias" (the table of its `RelativeBias`), "factor" (of queries).
          state, layer: the cache, and the block's number in it.
          train: whether dropout is active.
        Returns:
          x, {"attention", "mlp", perhaps "cross": what each added; "cross_key", "cross_value" where they are new} and, with a cache, the cache.
        """
        s, own, cache = self.settings, per_layer or {}, [state]
        drop = Dropout(s.dropout)

        def normalise(name: str, x: Array, dtype: str = s.dtype) -> Array:
            return norm(s.norm, s.norm_eps, dtype=dtype, param_dtype=s.param_dtype, name=name)(x)

        def write(key: Array, value: Array) -> tuple[Array, Array]:
            cache[0], key, value = cache[0].write(layer, key, value, shared["slots"])
            return key, value

        visibility, rotation, bias = shared["visibility"], shared.get("rotation"), shared.get("bias")
        if "window" in own:
            visibility = visibility.replace(window=own["window"])
        if "windowed" in own:
            rotation = jax.tree.map(lambda plain, local: jnp.where(own["windowed"], local, plain), rotation, shared["local_rotation"])
        if "relative_bias" in own:
            bias = bias.replace(table=own["relative_bias"])

        def attend(h: Array) -> Array:
            module = LanguageAttention(s, name="attention")
            made = module(h, visibility, rotation=rotation, bias=bias, factor=own.get("factor"), write=None if state is None else write)
            return checkpoint_name(made[0], "attended")

        def mlp(h: Array) -> Array:
            return Mlp(s.mlp_dim, s.activation, s.dropout, gated=s.gated, biases=tuple(name for name in s.biases if name in ("gate", "up", "down")),
                       up_init=s.width ** -0.5, down_init=(2 * s.depth * s.mlp_dim) ** -0.5, bias_init="zeros", name="mlp", **s.options)(h, train)

        def add(x: Array, *added: Array) -> Array:
            return constrain(sum(added, x).astype(x.dtype), "batch", "sequence", "embed")

        out: dict[str, Array] = {}
        if s.parallel:
            h = normalise("norm_attention", x)
            out["attention"] = drop(attend(h), train)
            out["mlp"] = drop(mlp(h if s.shared_norm else normalise("norm_mlp", x)), train)
            x = add(x, out["attention"], out["mlp"])
            return (x, out) if state is None else (x, out, cache[0])

        before, after = s.norm_place in ("pre", "both"), s.norm_place == "both"

        def step(x: Array, name: str, what: str, function: Callable[[Array], Array]) -> Array:
            added = function(normalise(name, x) if before else x)
            added = drop(normalise(f"{name}_out", added, wide(s.dtype)) if after else added, train)
            out[what] = added
            x = add(x, added)
            return x if before else normalise(name, x, x.dtype.name)

        x = step(x, "norm_attention", "attention", attend)
        if s.cross:
            known = None if shared.get("encoded") is not None else state.read_encoded(layer)[:2]

            def cross(h: Array) -> Array:
                module = LanguageAttention(s, name="cross_attention")
                added, made = module(h, shared["cross"], source=shared.get("encoded"), known=known)
                if known is None:
                    out["cross_key"], out["cross_value"] = made
                return added

            x = step(x, "norm_cross", "cross", cross)
        x = step(x, "norm_mlp", "mlp", mlp)
        return (x, out) if state is None else (x, out, cache[0])


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Attributes:
      settings, depth: of the blocks.
      positions: "rope", "alibi", "relative" or "none"; what is added to the embeddings is the caller's.
      rope: see `Decoder`.
      relative: of "relative", what `relative_settings` returns, and `bidirectional`.
      window, windowed: see `Decoder`.
      final_norm: whether the stack ends in a norm.
      scan, remat: see `nn.Stack`.
    """
    settings: BlockSettings
    depth: int
    positions: str = "none"
    rope: Mapping[str, Any] = FrozenDict()
    relative: Mapping[str, Any] = FrozenDict()
    window: int | None = None
    windowed: tuple[bool, ...] = (True,)
    final_norm: bool = True
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], visibility: Visibility, positions: Int[Array, "B T"], cache: Cache | None = None,
                 slots: Slots | None = None, encoded: tuple[Float[Array, "B M D"], Bool[Array, "B M"]] | None = None,
                 train: bool = False, inserted: Inserted | None = None) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Args:
          x: embeddings.
          visibility: of the tokens; with a cache its keys are those of `slots.key_position`.
          positions: of the tokens, -1 at padding.
          cache, slots: what `Cache.extend` returned for these tokens.
          encoded: states of an encoder and which are valid; with a cache that has its keys and values, None.
          train: whether dropout is active.
          inserted: blocks of others between these.
        Returns:
          x, float32 whatever the products are, and {"blocks": {name: [L, ...], perhaps "inserted": those of the inserted blocks}, "cache": the cache, where one
          is given}.
        """
        s = self.settings
        local = self.window_pattern()
        if all(local):   # then it is no data of a layer, and kernels can know it
            visibility = visibility.replace(window=self.window)
        shared: dict[str, Any] = {"visibility": visibility}
        per_layer: dict[str, Array] = {}
        if isinstance(s.attention_scale, tuple):
            per_layer["factor"] = jnp.asarray([scale / s.scale for scale in s.attention_scale], jnp.float32)
        if any(local) and not all(local):
            per_layer["window"] = jnp.where(jnp.asarray(local), self.window, 0)
        self._positions(shared, per_layer, positions, visibility, local)
        if s.cross:
            valid = encoded[1] if encoded is not None else cache.encoded[2]
            shared |= {"encoded": None if encoded is None else encoded[0], "cross": Visibility(positions, jnp.where(valid, 0, -1), causal=False)}
        if slots is not None:
            shared["slots"] = slots
        x = x.astype(wide(s.dtype))   # the stream: what blocks add is not rounded
        stack = Stack(partial(LanguageBlock, s), self.depth, self.scan, self.remat, name="blocks")
        layered = cache is not None and isinstance(cache.key, tuple)
        state = cache.stacked() if layered and self.scan else cache
        x, blocks, *after = stack(x, shared, per_layer=per_layer or None, state=state, inserted=inserted, train=train)
        if self.final_norm:
            x = norm(s.norm, s.norm_eps, dtype=wide(s.dtype), param_dtype=s.param_dtype, name="norm")(x)
        out = {"blocks": blocks}
        if cache is not None:
            cache = after[0].unstacked() if layered else after[0]
            if encoded is not None:
                cache = cache.replace(encoded=(blocks["cross_key"], blocks["cross_value"], encoded[1]))
            out["cache"] = cache
        return x, out

    def window_pattern(self) -> tuple[bool, ...]:
        """Which layers have a window."""
        return tuple(self.window is not None and bool(self.windowed[i % len(self.windowed)]) for i in range(self.depth))

    def _positions(self, shared: dict[str, Any], per_layer: dict[str, Array], positions: Array, visibility: Visibility, local: tuple[bool, ...]) -> None:
        """Adds what makes attention know the order of tokens."""
        s, key_position = self.settings, visibility.key_position
        if self.positions == "rope":
            rope = call(rope_settings, self.rope, "model.rope")
            tables = partial(rotary, positions, s.head_size, fraction=rope["fraction"])
            shared["rotation"] = tables(theta=rope["theta"], scaling=rope["scaling"])
            if rope["local_theta"] is not None and any(local):
                shared["local_rotation"] = tables(theta=rope["local_theta"], scaling=rope["local_scaling"])
                per_layer["windowed"] = jnp.asarray(local)
        elif self.positions == "alibi":
            shared["bias"] = alibi(alibi_slopes(s.num_heads), key_position)
        elif self.positions == "relative":
            settings = self.relative
            shape = (settings["buckets"], s.num_heads)
            table = self.param("relative_bias", initializer(s.width ** -0.5), shape if settings["shared"] else (self.depth, *shape), jnp.dtype(s.param_dtype))
            bias = RelativeBias(table if settings["shared"] else table[0], positions, key_position, settings["max_distance"], settings["bidirectional"])
            if not settings["shared"]:
                per_layer["relative_bias"] = table
            elif not in_blocks(positions.shape[1], key_position.shape[1]):
                bias = bias.dense()   # once for all layers
            shared["bias"] = bias
        elif self.positions != "none":
            raise ConfigError(f'positions: "{self.positions}" is unknown; choose "rope", "alibi", "relative" or "none".')


def rope_settings(theta: float = 10_000.0, fraction: float = 1.0, scaling: Mapping[str, Any] | None = None, local_theta: float | None = None,
                  local_scaling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings `rope` of a decoder, with their defaults.

    Args:
      theta, fraction, scaling: see `nn.rotary`.
      local_theta, local_scaling: of the layers that have a window; without a local_theta they are as the others.
    """
    return dict(theta=theta, fraction=fraction, scaling=scaling, local_theta=local_theta, local_scaling=local_scaling)


def check_rope(rope: Mapping[str, Any], head_size: int) -> None:
    """Raises a ConfigError for settings `rope` that do not fit each other, or heads of that width."""
    made = call(rope_settings, rope, "model.rope")
    check_rotary(head_size, theta=made["theta"], fraction=made["fraction"], scaling=made["scaling"])
    if made["local_theta"] is not None:
        check_rotary(head_size, theta=made["local_theta"], fraction=made["fraction"], scaling=made["local_scaling"])


def relative_settings(buckets: int = 32, max_distance: int = 128, shared: bool = True, encoder: bool = True) -> dict[str, Any]:
    """The settings `relative` of an encoder-decoder, with their defaults; see `EncoderDecoder`."""
    if buckets < 4 or max_distance <= buckets // 2:
        raise ConfigError(f"model.relative: {buckets} buckets and max_distance={max_distance}; give at least 4 buckets, and a distance above half of them.")
    return dict(buckets=buckets, max_distance=max_distance, shared=shared, encoder=encoder)
