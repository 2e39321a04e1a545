"""A decoder that reads pictures among its text: PaliGemma, and any model that puts image tokens where text tokens would be.

Beyer et al., "PaliGemma: A versatile 3B VLM for transfer" (2024), section 3; Steiner et al., "PaliGemma 2" (2024).
"""
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.language.decoder import Decoder
from vlm_jax.models.visual_tokens import PROJECTIONS, encode_images, image_tower, place, with_shared
from vlm_jax.nn.cache import Cache
from vlm_jax.settings import call, choose


class PrefixLM(nn.Module):
    """An image tower, a projection and a decoder.

    Tokens of the pictures, normalised and not pooled, are projected to the decoder's width and stand where `slots` says. They are not multiplied by
    `embed_scale`, as text is. Tokens of `prefix` see each other whatever their order, all others see what is before them; without a prefix the model is
    causal. Pictures of a size that the tower is not made for get resampled positions.

    `inputs` are those of `Decoder` with `images [B, N, H, W, 3]` and `slots [B, T]`: -1 for text, or which of the N * patches image tokens of its row
    stands here. Without images it is the decoder alone.

    Attributes:
      image, language: settings of `Vit` (`variant="So400m/14"` stands for sizes) and of `Decoder`.
      projection: a name of `visual_tokens.PROJECTIONS`.
      scan, remat, dtype, param_dtype, softmax_dtype: of both parts, unless their settings say otherwise.
    Raises:
      ConfigError: for settings that a part does not take, or images without slots.
    """
    image: Mapping[str, Any]
    language: Mapping[str, Any]
    projection: str = "linear"
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        # Frozen settings make models hashable, as static arguments of jit must be.
        object.__setattr__(self, "image", FrozenDict(self.image))
        object.__setattr__(self, "language", FrozenDict(self.language))
        super().__post_init__()

    def setup(self):
        self.image_tower = image_tower(self, name="image")
        self.language_model = self._decoder(name="language")
        self.projector = choose(PROJECTIONS, self.projection, "model.projection")(self.language_model.width, self, "projection")

    def _decoder(self, **given: Any) -> Decoder:
        return call(Decoder, with_shared(self.language, self), "model.language", **given)

    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Returns logits, float32, and the decoder's intermediates with {"image": the tower's}."""
        inputs, of_image = self._embedded(inputs, train)
        logits, out = self.language_model(inputs, train)
        return logits, {**out, "image": of_image}

    def start(self, inputs: Mapping[str, Array], cache_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Reads a prompt; returns the logits of what comes next, and the cache."""
        return self.language_model.start(self._embedded(inputs)[0], cache_length)

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None, images: Float[Array, "B N H W 3"] | None = None,
               slots: Int[Array, "B T"] | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Goes on with tokens of text, or with text and further pictures; see `Decoder.extend`. Their `slots` count from 0 again."""
        if images is None:
            return self.language_model.extend(tokens, cache, valid)
        inputs, _ = self._embedded({"tokens": tokens, "images": images, "slots": slots})
        return self.language_model.extend(tokens, cache, valid, inputs["embeddings"])

    def _embedded(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
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

    def head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `vocabulary_loss` that turn hidden states into logits."""
        return self._decoder(parent=None).head(params["language"])

    def parts(self) -> tuple[nn.Module, Decoder]:
        """The image tower and the decoder, unbound: what their settings resolve to."""
        return image_tower(self, parent=None), self._decoder(parent=None)

    def image_tokens(self) -> int:
        """Tokens of one picture of the size that the tower is made for."""
        down, across = self.parts()[0].grid()
        return down * across

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"images", "tokens", "slots"} of one example with one picture and one token of text."""
        length = self.image_tokens() + 1
        return {"images": (1, *self.parts()[0].input_shape()), "tokens": (length,), "slots": (length,)}
