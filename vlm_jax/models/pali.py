"""Pictures into the encoder of an encoder-decoder: PaLI, PaLI-X, PaLI-3 and, with flexible patches, ScreenAI.

Chen et al., "PaLI: A Jointly-Scaled Multilingual Language-Image Model" (2022), section 3.1; "PaLI-X" (2023); "PaLI-3" (2023); Baechler et al., "ScreenAI".
"""
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from vlm_jax.language.encoder_decoder import EncoderDecoder
from vlm_jax.models.vision_language import Projected
from vlm_jax.models.visual_tokens import encode_images, place


class Pali(Projected):
    """An image tower, a projection and an encoder-decoder whose encoder reads the image tokens and the text together.

    `inputs` are those of `EncoderDecoder` with `images [B, N, H, W, 3]` (pictures or frames, one after the other), or `patches [B, P, K]` for
    `patching="flexible"`. With `slots [B, T]` image tokens stand where it says (see `PrefixLM`), without in front of the text. Without images it is the
    encoder-decoder alone.

    Attributes:
      image, language, projection, ...: see `Projected`; the tower is a `Vit` or a `FlexibleVit`, the language model an `EncoderDecoder`.
      patching: "grid", or "flexible" for pictures in their own aspect ratio.
    """
    patching: str = "grid"
    language_class = EncoderDecoder

    def embedded(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
        """See `Projected.embedded`."""
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

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"images" or "patches", "tokens", "targets"} of one example with one picture, one token of text and one of the answer."""
        shape = self.parts()[0].input_shape()
        pictures = {"patches": shape} if self.patching == "flexible" else {"images": (1, *shape)}
        return {**pictures, "tokens": (1,), "targets": (1,)}
