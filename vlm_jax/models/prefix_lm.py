"""A decoder that reads pictures among its text: PaliGemma, and any model that puts image tokens where text tokens would be.

Beyer et al., "PaliGemma: A versatile 3B VLM for transfer" (2024), section 3; Steiner et al., "PaliGemma 2" (2024).
"""
from collections.abc import Mapping

from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.language.decoder import Decoder
from vlm_jax.models.vision_language import Projected
from vlm_jax.models.visual_tokens import encode_images, place
from vlm_jax.nn.cache import Cache


class PrefixLM(Projected):
    """An image tower, a projection and a decoder.

    Tokens of the pictures, normalised and not pooled, are projected to the decoder's width and stand where `slots` says. They are not multiplied by
    `embed_scale`, as text is. Tokens of `prefix` see each other whatever their order, all others see what is before them; without a prefix the model is
    causal. Pictures of a size that the tower is not made for get resampled positions.

    `inputs` are those of `Decoder` with `images [B, N, H, W, 3]` and `slots [B, T]`: -1 for text, or which of the N * patches image tokens of its row
    stands here. Without images it is the decoder alone.

    Its attributes are those of `Projected`; the tower is a `Vit`, the language model a `Decoder`.

    Raises:
      ConfigError: for settings that a part does not take, or images without slots.
    """
    language_class = Decoder

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None, images: Float[Array, "B N H W 3"] | None = None,
               slots: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Goes on with tokens of text, or with text and further pictures; see `Decoder.extend`. Their `slots` count from 0 again."""
        if images is None:
            return self.language_model.extend(tokens, cache, valid)
        inputs, _ = self.embedded({"tokens": tokens, "images": images, "slots": slots})
        return self.language_model.extend(tokens, cache, valid, inputs["embeddings"])

    def embedded(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
        """See `Projected.embedded`."""
        inputs = dict(inputs)
        slots = inputs.pop("slots", None)
        if "images" not in inputs:
            if self.is_initializing():
                raise ConfigError("PrefixLM: its parameters are made from inputs with images; give what input_shapes() says.")
            return inputs, {}
        if slots is None:
            raise ConfigError("PrefixLM: images without slots have no place in the text; the processor's format gives both.")
        bank, _, out = encode_images(self.image_tower, self.projector, inputs, train)
        inputs.pop("images")
        inputs["embeddings"] = place(bank, slots, self.language_model.embed(inputs.pop("tokens")))
        return inputs, out

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"images", "tokens", "slots"} of one example with one picture and one token of text."""
        length = self.image_tokens() + 1
        return {"images": (1, *self.parts()[0].input_shape()), "tokens": (length,), "slots": (length,)}
