"""Pictures into the encoder of an encoder-decoder: PaLI, PaLI-X, PaLI-3 and, with flexible patches, ScreenAI.

Chen et al., "PaLI: A Jointly-Scaled Multilingual Language-Image Model" (2022), section 3.1; "PaLI-X" (2023); "PaLI-3" (2023); Baechler et al., "ScreenAI".
"""
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.language.encoder_decoder import EncoderDecoder
from vlm_jax.models.visual_tokens import PROJECTIONS, encode_images, image_tower, place, with_shared
from vlm_jax.nn.cache import Cache
from vlm_jax.settings import call, choose


class Pali(nn.Module):
    """An image tower, a projection and an encoder-decoder whose encoder reads the image tokens and the text together.

    `inputs` are those of `EncoderDecoder` with `images [B, N, H, W, 3]` (pictures or frames, one after the other), or `patches [B, P, K]` for
    `patching="flexible"`. With `slots [B, T]` image tokens stand where it says (see `PrefixLM`), without in front of the text. Without images it is the
    encoder-decoder alone.

    Attributes:
      image, language: settings of `Vit` or `FlexibleVit`, and of `EncoderDecoder`.
      patching: "grid", or "flexible" for pictures in their own aspect ratio.
      projection: a name of `visual_tokens.PROJECTIONS`.
      scan, remat, dtype, param_dtype, softmax_dtype: of both parts, unless their settings say otherwise.
    """
    image: Mapping[str, Any]
    language: Mapping[str, Any]
    patching: str = "grid"
    projection: str = "linear"
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "image", FrozenDict(self.image))
        object.__setattr__(self, "language", FrozenDict(self.language))
        super().__post_init__()

    def setup(self):
        self.image_tower = image_tower(self, self.patching, name="image")
        self.language_model = self._language(name="language")
        self.projector = choose(PROJECTIONS, self.projection, "model.projection")(self.language_model.width, self, "projection")

    def _language(self, **given: Any) -> EncoderDecoder:
        return call(EncoderDecoder, with_shared(self.language, self), "model.language", **given)

    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Returns the logits of the targets, float32, and the encoder-decoder's intermediates with {"image": the tower's}."""
        inputs, of_image = self._embedded(inputs, train)
        logits, out = self.language_model(inputs, train)
        return logits, {**out, "image": of_image}

    def start(self, inputs: Mapping[str, Array], cache_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Encodes, and decodes the start token; returns the logits of the first token of the answer, and the cache."""
        return self.language_model.start(self._embedded(inputs)[0], cache_length)

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Goes on with the answer; see `EncoderDecoder.extend`."""
        return self.language_model.extend(tokens, cache, valid)

    def _embedded(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
        inputs = dict(inputs)
        slots = inputs.pop("slots", None)
        pictures = "patches" if self.patching == "flexible" else "images"
        if pictures not in inputs and not self.is_initializing():
            return inputs, {}
        bank, filled, out = encode_images(self.image_tower, self.projector, inputs, train)
        inputs.pop(pictures)
        tokens = inputs.pop("tokens")
        text = self.language_model.embed(tokens)
        valid = inputs.get("valid", jnp.ones(tokens.shape, bool))
        if slots is None:
            text = jnp.concatenate([bank.astype(text.dtype), text], axis=1)
            valid = jnp.concatenate([filled, valid], axis=1)
        else:
            text = place(bank, slots, text)
            valid = valid & ((slots < 0) | jnp.take_along_axis(filled, jnp.maximum(slots, 0), axis=1, mode="clip"))
        return {**inputs, "embeddings": text, "valid": valid}, out

    def head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `vocabulary_loss` that turn hidden states into logits."""
        return self._language(parent=None).head(params["language"])

    def parts(self) -> tuple[nn.Module, EncoderDecoder]:
        """The image tower and the encoder-decoder, unbound: what their settings resolve to."""
        return image_tower(self, self.patching, parent=None), self._language(parent=None)

    def image_tokens(self) -> int:
        """Tokens of one picture of the size that the tower is made for; with flexible patches, at most."""
        tower = self.parts()[0]
        if self.patching == "flexible":
            return tower.max_patches
        down, across = tower.grid()
        return down * across

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"images" or "patches", "tokens", "targets"} of one example with one picture, one token of text and one of the answer."""
        shape = self.parts()[0].input_shape()
        pictures = {"patches": shape} if self.patching == "flexible" else {"images": (1, *shape)}
        return {**pictures, "tokens": (1,), "targets": (1,)}
