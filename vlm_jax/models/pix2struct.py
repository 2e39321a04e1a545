"""Screenshots into text: an encoder over flexible patches and a text decoder that reads its states. Lee et al., "Pix2Struct" (2023), section 2.

Prompts are part of the picture: the encoder reads nothing else.
"""
from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.encoders.flexible_vit import MAX_ROWS, PatchEmbedding, filled
from vlm_jax.errors import ConfigError
from vlm_jax.language.encoder_decoder import EncoderDecoder
from vlm_jax.language.transformer import BlockSettings
from vlm_jax.models.visual_tokens import with_shared
from vlm_jax.nn.cache import Cache
from vlm_jax.settings import call, choose

ENCODER_SIZES = ("mlp_dim", "num_heads", "head_dim", "activation", "norm_eps")


class ScreenLanguage(EncoderDecoder):
    """An encoder-decoder whose encoder may have sizes of its own: `encoder_settings`, by the names of `ENCODER_SIZES`."""
    encoder_settings: Mapping[str, Any] = FrozenDict()

    def block_settings(self, which: str) -> BlockSettings:
        """The settings of the blocks of "encoder" or "decoder"."""
        settings = super().block_settings(which)
        for name in self.encoder_settings:
            choose(dict.fromkeys(ENCODER_SIZES), name, "model.encoder")
        return dataclasses.replace(settings, **self.encoder_settings) if which == "encoder" else settings


class Pix2Struct(nn.Module):
    """Patches, embedded with their rows and columns, are what the encoder of an encoder-decoder reads.

    `inputs`: `patches [B, P, 2 + K]` (the image operation `flexible_patches`), `targets`, `target_valid`; see `EncoderDecoder`.

    Attributes:
      image: `max_patches` (what the processor makes), `patch_size`, `channels` and `max_rows` (rows of each of the two tables of positions).
      language: settings of `EncoderDecoder`; `relative=dict(encoder=False)` keeps its encoder without positions of its own.
      encoder: sizes of the encoder where they are not the decoder's: mlp_dim, num_heads, head_dim, activation, norm_eps.
      scan, remat, dtype, param_dtype, softmax_dtype: of all parts, unless `language` says otherwise.
    """
    image: Mapping[str, Any]
    language: Mapping[str, Any]
    encoder: Mapping[str, Any] = FrozenDict()
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "image", FrozenDict(self.image))
        object.__setattr__(self, "language", FrozenDict(self.language))
        object.__setattr__(self, "encoder", FrozenDict(self.encoder))
        super().__post_init__()

    def setup(self):
        self.language_model = self._language(name="language")
        settings = {name: value for name, value in self.image_settings().items() if name != "max_patches"}
        self.embedding = PatchEmbedding(self.language_model.width, dtype=self.dtype, param_dtype=self.param_dtype, name="image", **settings)

    def image_settings(self) -> dict[str, int]:
        """All settings of `image`, with their defaults."""
        return call(_image_settings, self.image, "model.image")

    def parts(self) -> tuple[EncoderDecoder, dict[str, Any]]:
        """The encoder-decoder, unbound, and the sizes of its encoder."""
        language = self._language(parent=None)
        return language, {name: getattr(language.block_settings("encoder"), name) for name in ENCODER_SIZES}

    def _language(self, **given: Any) -> "ScreenLanguage":
        return call(ScreenLanguage, {**with_shared(self.language, self), "encoder_settings": self.encoder}, "model.language", **given)

    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Returns the logits of the targets, float32, and the encoder-decoder's intermediates with {"image": {"stem": the embedded patches}}."""
        inputs = self._embedded(inputs)
        logits, out = self.language_model(inputs, train)
        return logits, {**out, "image": {"stem": inputs["embeddings"]}}

    def start(self, inputs: Mapping[str, Array], cache_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Encodes, and decodes the start token; returns the logits of the first token of the answer, and the cache."""
        return self.language_model.start(self._embedded(inputs), cache_length)

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Goes on with the answer; see `EncoderDecoder.extend`."""
        return self.language_model.extend(tokens, cache, valid)

    def _embedded(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if "patches" not in inputs:
            raise ConfigError(f'Pix2Struct reads "patches", which the inputs lack (they hold {", ".join(sorted(inputs))}); list the image operation '
                              "flexible_patches in the processor.")
        inputs = {name: value for name, value in inputs.items() if name not in ("tokens", "slots")}
        patches = inputs.pop("patches")
        return {**inputs, "embeddings": self.embedding(patches), "valid": filled(patches)}

    def head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `vocabulary_loss` that turn hidden states into logits."""
        return self._language(parent=None).head(params["language"])

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"patches", "targets"} of one example with one token of text."""
        self.parts()
        image = self.image_settings()
        return {"patches": (image["max_patches"], 2 + image["patch_size"] ** 2 * image["channels"]), "targets": (1,)}


def _image_settings(max_patches: int = 2048, patch_size: int = 16, channels: int = 3, max_rows: int = MAX_ROWS) -> dict[str, int]:
    """The settings that `Pix2Struct.image` takes, with their defaults."""
    return dict(max_patches=max_patches, patch_size=patch_size, channels=channels, max_rows=max_rows)
