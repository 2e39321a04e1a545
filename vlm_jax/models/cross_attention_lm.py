"""A language model that reads pictures by cross-attention between its layers: Flamingo, OpenFlamingo, IDEFICS.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022), section 2; Awadalla et al., "OpenFlamingo" (2023); Laurençon et al., "OBELICS"
(2023), appendix on IDEFICS.
"""
from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.connectors.resampler import PerceiverResampler
from vlm_jax.errors import ConfigError
from vlm_jax.language.decoder import Decoder
from vlm_jax.language.gated_cross_attention import GatedCrossAttention, gated_block, gated_settings, media_visibility
from vlm_jax.models.vision_language import VisionLanguage
from vlm_jax.models.visual_tokens import SHARED, image_tower, with_shared
from vlm_jax.nn.cache import Cache
from vlm_jax.nn.stack import Inserted, Stack, inserted_places, layers_of
from vlm_jax.settings import call

FEATURES = ("tokens", "unnormalised", "unnormalised_with_class")


class CrossAttentionLM(VisionLanguage):
    """An image tower, a resampler and a decoder between whose layers stand gated cross-attention blocks.

    Parameters are `image`, `resampler`, `gated/blocks` (stacked) and `language`, which is the tree of the decoder alone: with gates at 0, where they start, the
    model is that decoder, exactly, whatever the pictures.

    `inputs` are those of `Decoder` with `images [B, N, H, W, 3]`, or `[B, N, F, H, W, 3]` of video frames, and `media_index [B, T]`: which of the N
    pictures of its row a token reads (the last one at or before it), or -1 for none. Pictures that nothing refers to are filling. Older pictures act
    through the self-attention of the decoder (section 2.3), which is how a model trained with five pictures reads thirty-two. Without images it is the
    decoder with the MLPs of the blocks.

    Attributes:
      image, language: see `VisionLanguage`; the language model is a `Decoder`.
      gated: settings of the blocks, see `gated_settings`.
      resampler: settings of a `PerceiverResampler`, or None: then the blocks read the tower's tokens.
      image_features: what of the tower is read: "tokens" (normalised, without the class token), "unnormalised", or "unnormalised_with_class".
    Raises:
      ConfigError: for settings that a part does not take, or images without media_index.
    """
    gated: Mapping[str, Any] = FrozenDict()
    resampler: Mapping[str, Any] | None = None
    image_features: str = "tokens"
    language_class = Decoder

    def __post_init__(self):
        object.__setattr__(self, "gated", FrozenDict(self.gated))
        if self.resampler is not None:
            object.__setattr__(self, "resampler", FrozenDict(self.resampler))
        super().__post_init__()

    def setup(self):
        self.image_tower = self._image_tower(name="image")
        self.language_model = self._language(name="language")
        if self.resampler is not None:
            self.latents = self._resampler(name="resampler")
        self.gated_blocks = GatedBlocks(self.gated_settings(), self.language_model.depth, **{name: getattr(self, name) for name in SHARED}, name="gated")

    def gated_settings(self) -> FrozenDict:
        """The settings of the gated blocks, with their defaults."""
        return FrozenDict(call(gated_settings, {**self.gated, "width": self._language(parent=None).width}, "model.gated"))

    def _resampler(self, **given: Any) -> PerceiverResampler:
        return call(PerceiverResampler, with_shared(self.resampler, self), "model.resampler", **given)

    def _image_tower(self, **given: Any) -> nn.Module:
        if self.image_features not in FEATURES:
            raise ConfigError(f'model.image_features: "{self.image_features}" is unknown; choose one of {", ".join(FEATURES)}.')
        return image_tower(self, self.patching, pools=True, **given)

    def connector(self) -> PerceiverResampler | None:
        """The resampler, unbound: what its settings resolve to."""
        return None if self.resampler is None else self._resampler(parent=None)

    def media_tokens(self) -> int:
        """Vectors that the blocks read of one picture of the size that the tower is made for."""
        if self.resampler is not None:
            return self.connector().num_latents
        down, across = self.parts()[0].grid()
        return down * across + (self.image_features == "unnormalised_with_class")

    def image_tokens(self) -> int:
        """Tokens of the text that a picture takes: none, but for its mark."""
        return 0

    def media(self, images: Float[Array, "B N *F H W 3"], train: bool = False) -> tuple[Float[Array, "B N R E"], dict[str, Array]]:
        """What the blocks read of pictures [B, N, H, W, 3] or videos [B, N, F, H, W, 3]: R vectors of each, and the tower's intermediates.

        Raises:
          ConfigError: for arrays of other axes.
        """
        if images.ndim not in (5, 6):
            raise ConfigError(f'"images" have shape {images.shape}; give 5 axes, [batch, pictures, height, width, 3], or 6 with frames before the height.')
        batch, number = images.shape[:2]
        frames = images.shape[2] if images.ndim == 6 else 1
        _, out = self.image_tower(images.reshape(-1, *images.shape[-3:]), train)
        features = out["tokens"] if self.image_features == "tokens" else out["unnormalised"]
        if self.image_features == "unnormalised" and getattr(self.image_tower, "pool", None) == "cls":
            features = features[:, 1:]
        features = features.reshape(batch * number, frames, *features.shape[1:])
        if self.resampler is None:
            media = features.reshape(batch * number, -1, features.shape[-1])
        else:
            media, out["resampler"] = self.latents(features)
        return media.reshape(batch, number, *media.shape[1:]), out

    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Returns logits, float32, and the language model's intermediates with {"image": the tower's, "media": what the blocks read [B, N, R, E]}."""
        inputs, images, media_index = self._split(inputs)
        media, of_image = (None, {}) if images is None else self.media(images, train)
        inputs["embeddings"] = self._embedded(inputs)
        inserted = self._inserted(inputs["embeddings"], media, media_index, train=train, segment_ids=inputs.get("segment_ids"))
        logits, out = self.language_model(inputs, train, inserted=inserted)
        return logits, {**out, "image": of_image, **({} if media is None else {"media": media})}

    def start(self, inputs: Mapping[str, Array], cache_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Reads a prompt with its pictures, whose keys and values the cache then holds; see `Decoder.start`."""
        inputs, images, media_index = self._split(inputs)
        media = None if images is None else self.media(images)[0]
        inputs["embeddings"] = embeddings = self._embedded(inputs)
        inserted = self._inserted(embeddings, media, media_index, segment_ids=inputs.get("segment_ids"))
        logits, cache = self.language_model.start(inputs, cache_length, inserted)
        valid = inputs.get("valid", jnp.ones(embeddings.shape[:2], bool)).astype(bool)
        return logits, self._remember(cache, media, last_index(media_index, valid, jnp.full(len(embeddings), -1)))

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None, images: Float[Array, "B N *F H W 3"] | None = None,
               media_index: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Goes on with tokens of text, or with text and further pictures; see `Decoder.extend`.

        Args:
          images: pictures that come behind those of the cache.
          media_index: counts from 0 among `images`; where it is -1, or missing, a token reads the picture that its row read last.
        """
        before = self._pictures(cache)
        index = jnp.full(tokens.shape, -1) if media_index is None or images is None else media_index
        # From the first new picture on a row reads those: what the cache says is for the tokens before it.
        index = jnp.where(index >= 0, before + index, cache.media[:, None])
        there = jnp.ones(tokens.shape, bool) if valid is None else valid.astype(bool)
        cache = self._remember(cache, None if images is None else self.media(images)[0], last_index(index, there, cache.media))
        embeddings = self.language_model.embed(tokens)
        return self.language_model.extend(tokens, cache, valid, embeddings, self._inserted(embeddings, None, index, cache))

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"images", "tokens", "media_index"} of one example with one picture and two tokens of text."""
        self.gated_settings()
        return {"images": (1, *self.parts()[0].input_shape()), "tokens": (2,), "media_index": (2,)}

    def _split(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], Array | None, Int[Array, "B T"]]:
        """(inputs of the language model, images or None, media_index)."""
        inputs = dict(inputs)
        images, index = inputs.pop("images", None), inputs.pop("media_index", None)
        if images is None and self.is_initializing():
            raise ConfigError("CrossAttentionLM: its parameters are made from inputs with images; give what input_shapes() says.")
        if images is not None and index is None:
            raise ConfigError("CrossAttentionLM: images without media_index are read by no token; the processor's format gives both.")
        main = inputs["tokens"] if inputs.get("embeddings") is None else inputs["embeddings"]
        if index is not None and index.shape != main.shape[:2]:
            raise ConfigError(f'CrossAttentionLM: inputs["media_index"] has shape {index.shape} for {main.shape[:2]} tokens; give one entry for each token.')
        if images is None or index is None:
            index = jnp.full(main.shape[:2], -1)
        return inputs, images, index

    def _embedded(self, inputs: dict[str, Array]) -> Float[Array, "B T D"]:
        embeddings, tokens = inputs.get("embeddings"), inputs.pop("tokens", None)
        return self.language_model.embed(tokens) if embeddings is None else embeddings

    def _inserted(self, x: Array, media: Array | None, index: Int[Array, "B T"], cache: Cache | None = None, train: bool = False,
                  segment_ids: Int[Array, "B T"] | None = None) -> Inserted:
        if cache is not None and cache.encoded is not None:
            return self.gated_blocks(x, None, index, jnp.where(cache.encoded[2], self._key_media(cache.encoded[2].shape), -1), cache, train)
        if media is None:
            return self.gated_blocks(x, None, index, jnp.full((x.shape[0], 1), -1), None, train)
        rows = media.reshape(media.shape[0], -1, media.shape[-1])
        key_media = jnp.broadcast_to(jnp.arange(rows.shape[1]) // media.shape[2], rows.shape[:2])
        return self.gated_blocks(x, rows, index, key_media, None, train, segment_ids)

    def _key_media(self, shape: tuple[int, ...]) -> Int[Array, "B M"]:
        return jnp.broadcast_to(jnp.arange(shape[1]) // self.media_tokens(), shape)

    def _pictures(self, cache: Cache) -> int:
        return 0 if cache.encoded is None else cache.encoded[2].shape[1] // self.media_tokens()

    def _remember(self, cache: Cache, media: Float[Array, "B N R E"] | None, last: Int[Array, "B"]) -> Cache:
        """The cache with the keys and values of further pictures, and the picture that each row reads last."""
        cache = cache.replace(media=last)
        if media is None:
            return cache
        rows = media.reshape(media.shape[0], -1, media.shape[-1])
        if media.shape[2] != self.media_tokens():
            raise ConfigError(f"CrossAttentionLM: a picture gives {media.shape[2]} vectors, but one of the model's size {self.media_tokens()}; "
                              "without a resampler give pictures of the model's size, one frame each.")
        layered = isinstance(cache.key, tuple)
        cache = cache.stacked()
        key, value = self.gated_blocks.keys(rows)
        made = key.astype(cache.key.dtype), value.astype(cache.key.dtype), jnp.ones(rows.shape[:2], bool)
        if cache.encoded is not None:
            axes = (2, 2, 1)
            made = tuple(jnp.concatenate([old, new], axis=axis) for old, new, axis in zip(cache.encoded, made, axes))
        cache = cache.replace(encoded=made)
        return cache.unstacked() if layered else cache


class GatedBlocks(nn.Module):
    """The gated blocks of a `CrossAttentionLM`: parameters `blocks`, stacked.

    Attributes:
      settings: what `gated_settings` returned. depth: layers of the language model.
    """
    settings: Mapping[str, Any]
    depth: int
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def setup(self):
        places = inserted_places(self.depth, self.settings["every"], self.settings["first"])
        attributes = gated_block(dict(self.settings), len(places), dtype=self.dtype, param_dtype=self.param_dtype, softmax_dtype=self.softmax_dtype)
        self.places, self.block = places, GatedCrossAttention(**attributes, parent=None)
        self.blocks = Stack(partial(GatedCrossAttention, **attributes), len(places), self.scan, self.remat)

    def __call__(self, x: Float[Array, "B T D"], media: Float[Array, "B M E"] | None, media_index: Int[Array, "B T"], key_media: Int[Array, "B M"],
                 cache: Cache | None = None, train: bool = False, segment_ids: Int[Array, "B T"] | None = None) -> Inserted:
        """The blocks as the language model runs them between its layers; `media` and `cache` as `GatedCrossAttention` takes them."""
        visibility = media_visibility(media_index, key_media, self.settings["all_previous"], segment_ids)
        return self.blocks.inserted(self.places, x, media, visibility, cache, train=train)

    def keys(self, media: Float[Array, "B M E"]) -> tuple[Float[Array, "G B M K D"], Float[Array, "G B M K D"]]:
        """The keys and values that every block makes of media."""
        params = self.variables["params"]["blocks"]
        made = [self.block.apply({"params": block}, media, method="keys") for block in layers_of(params, len(self.places))]
        return tuple(jnp.stack(arrays) for arrays in zip(*made))


def last_index(media_index: Int[Array, "B T"], valid: Bool[Array, "B T"], otherwise: Int[Array, "B"]) -> Int[Array, "B"]:
    """The picture of the last valid token of each row; `otherwise` where a row has none."""
    last = jnp.where(valid, jnp.arange(valid.shape[1]), -1).max(1)
    found = jnp.take_along_axis(media_index, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return jnp.where(last >= 0, found, otherwise)
