"""Gated cross-attention: what a language model reads of pictures, between its own layers, which stay as they are.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022), section 2.2 and figure 4; with RMS norms, a gated MLP and norms of queries and
keys: Laurençon et al., "OBELICS" (2023), IDEFICS.
"""
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.language.transformer import BlockSettings, LanguageAttention
from vlm_jax.nn import Dropout, Mlp, norm
from vlm_jax.nn.cache import Cache
from vlm_jax.nn.precision import wide
from vlm_jax.nn.visibility import Visibility
from vlm_jax.settings import call
from vlm_jax.sharding.activations import constrain

GATES = ("scalar", "vector")


def media_visibility(media_index: Int[Array, "B T"], key_media: Int[Array, "B M"], all_previous: bool = False,
                     segment_ids: Int[Array, "B T"] | None = None) -> Visibility:
    """Which vectors of pictures each token reads: those of its picture alone, or of the pictures before it too.

    Args:
      media_index: the picture of each token, -1 for none (section 2.3: phi).
      key_media: the picture that each vector is of, -1 at padding.
      all_previous: the ablation of appendix D.1: a token reads all pictures up to its own.
      segment_ids: documents packed into one row, whose pictures stand in the order of the documents; a token reads those of its own alone.
    """
    if not all_previous:
        return Visibility(media_index, key_media, window=1)   # which is in the token's document, as its index says
    if segment_ids is None:
        return Visibility(media_index, key_media)
    return Visibility(media_index, key_media, segment_ids, media_segments(media_index, key_media, segment_ids))


def media_segments(media_index: Int[Array, "B T"], key_media: Int[Array, "B M"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B M"]:
    """The document of each vector: that of the tokens which read its picture, or read pictures on both sides of it; else one that no token has."""
    index, number = media_index[:, None], key_media[:, :, None]
    behind, before = index >= jnp.maximum(number, 0), (index >= 0) & (index <= number)   # [B, M, T]
    first, last = behind.argmax(-1), index.shape[-1] - 1 - before[..., ::-1].argmax(-1)
    of_first, of_last = (jnp.take_along_axis(segment_ids, place, axis=1) for place in (first, last))
    return jnp.where(behind.any(-1) & before.any(-1) & (of_first == of_last), of_first, jnp.iinfo(segment_ids.dtype).min)


class GatedCrossAttention(nn.Module):
    """x + tanh(a) attention(norm(x), media), then x + tanh(b) mlp(norm(x)); a and b start at 0, so that the block begins as the identity.

    A token that reads no picture gets nothing from the attention; the MLP acts on it nonetheless.

    Attributes:
      settings: of the block: those of a block of the language model, with sizes and norms of their own.
      norm_media: whether keys and values are made of normalised media (Flamingo), by a norm of their own.
      gate: "scalar" (one number a sub-layer) or "vector" (one a channel).
      gate_init: what the gates start at.
    """
    settings: BlockSettings
    norm_media: bool = True
    gate: str = "scalar"
    gate_init: float = 0.0

    def setup(self):
        s = self.settings
        if self.norm_media:
            self.norm_media_vectors = norm(s.norm, s.norm_eps, name="norm_media", **s.options)
        self.norm_cross = norm(s.norm, s.norm_eps, **s.options)
        self.cross_attention = LanguageAttention(s)
        self.norm_mlp = norm(s.norm, s.norm_eps, **s.options)
        self.mlp = Mlp(s.mlp_dim, s.activation, s.dropout, gated=s.gated, biases=tuple(name for name in s.biases if name in ("gate", "up", "down")),
                       up_init=s.width ** -0.5, down_init=(2 * s.depth * s.mlp_dim) ** -0.5, bias_init="zeros", **s.options)
        shape = (s.width,) if self.gate == "vector" else ()
        self.gate_cross, self.gate_mlp = (self.param(name, nn.initializers.constant(self.gate_init), shape, jnp.dtype(s.param_dtype))
                                          for name in ("gate_cross", "gate_mlp"))
        self.drop = Dropout(s.dropout)

    def __call__(self, x: Float[Array, "B T D"], media: Float[Array, "B M E"] | None, visibility: Visibility, cache: Cache | None = None, *,
                 layer: Any = None, train: bool = False) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Args:
          media: the vectors of all pictures of each row, one after the other; None where the cache has their keys and values, or there is no picture.
          visibility: see `media_visibility`; without pictures of one key that nobody reads.
          cache: whose `encoded` has the keys and values of the pictures for every block.
          layer: the number of this block in it.
          train: whether dropout is active.
        Returns:
          x, and {"cross", "mlp": what each added, gated}.
        """
        s, known = self.settings, None
        if media is None:
            nothing = jnp.zeros((x.shape[0], 1, s.groups, s.head_size), s.dtype)
            known = (nothing, nothing) if cache is None else cache.read_encoded(layer)[:2]
        attended, _ = self.cross_attention(self.norm_cross(x), visibility, source=self._source(media), known=known)
        attended = jnp.where((visibility.query_position >= 0)[..., None], attended, 0)   # else a bias of `out` would be added to tokens without picture
        out = {"cross": self._opened(self.gate_cross) * self.drop(attended, train)}
        x = constrain((x + out["cross"]).astype(x.dtype), "batch", "sequence", "embed")
        out["mlp"] = self._opened(self.gate_mlp) * self.drop(self.mlp(self.norm_mlp(x), train), train)
        return constrain((x + out["mlp"]).astype(x.dtype), "batch", "sequence", "embed"), out

    def keys(self, media: Float[Array, "B M E"]) -> tuple[Float[Array, "B M K D"], Float[Array, "B M K D"]]:
        """The keys and values that the block makes of media, for a cache."""
        nobody = jnp.zeros((media.shape[0], 0, self.settings.width), media.dtype)
        visibility = media_visibility(jnp.zeros((media.shape[0], 0), jnp.int32), jnp.zeros(media.shape[:2], jnp.int32))
        return self.cross_attention(nobody, visibility, source=self._source(media))[1]

    def _source(self, media: Float[Array, "B M E"] | None) -> Float[Array, "B M E"] | None:
        return self.norm_media_vectors(media) if self.norm_media and media is not None else media

    def _opened(self, gate: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.tanh(gate.astype(wide(self.settings.dtype)))


def gated_settings(width: int, num_heads: int, every: int = 1, first: int = 0, head_dim: int | None = None, mlp_dim: int | None = None, norm: str = "layer",
                   norm_eps: float = 1e-5, norm_media: bool = True, activation: str = "squared_relu", gated: bool = False,
                   biases: tuple[str, ...] = (), qk_norm: str | None = None, gate: str = "scalar", gate_init: float = 0.0,
                   all_previous: bool = False, dropout: float = 0.0) -> dict[str, Any]:
    """The settings `gated` of a `CrossAttentionLM`, with their defaults, which are Flamingo's.

    Args:
      width: of the language model. num_heads, head_dim, mlp_dim (4 width), norm, activation, gated, biases, qk_norm: see `Decoder`.
      every, first: the blocks stand before the layers first, first + every, ... of the language model, counted from 0.
      norm_media, gate, gate_init: see `GatedCrossAttention`. all_previous: see `media_visibility`.
    """
    if gate not in GATES:
        raise ConfigError(f'model.gated.gate: "{gate}" is unknown; choose one of {", ".join(GATES)}.')
    return dict(width=width, num_heads=num_heads, every=every, first=first, head_dim=head_dim, mlp_dim=mlp_dim or 4 * width, norm=norm, norm_eps=norm_eps,
                norm_media=norm_media, activation=activation, gated=gated, biases=tuple(biases), qk_norm=qk_norm, gate=gate, gate_init=gate_init,
                all_previous=all_previous, dropout=dropout)


def gated_block(settings: dict[str, Any], depth: int, **dtypes: str) -> dict[str, Any]:
    """The attributes of a `GatedCrossAttention`, one of `depth`, from what `gated_settings` returned."""
    own = {name: value for name, value in settings.items() if name not in ("every", "first", "norm_media", "gate", "gate_init", "all_previous")}
    block = call(BlockSettings, {**own, "depth": depth, **dtypes}, "model.gated")
    return dict(settings=block, norm_media=settings["norm_media"], gate=settings["gate"], gate_init=settings["gate_init"])
