"""An image tower, a projection and a language model: what the models share whose pictures become vectors among those of the text."""
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.models.visual_tokens import PROJECTIONS, image_tower, with_shared
from vlm_jax.nn.cache import Cache
from vlm_jax.settings import call, choose


class VisionLanguage(nn.Module):
    """The common part of all of them: a tower and a language model, of the class that a subclass says.

    Attributes:
      image, language: settings of the tower (`tower="nfnet"` chooses another than the vision transformer, `variant="So400m/14"` stands for sizes) and of
        the language model.
      scan, remat, dtype, param_dtype, softmax_dtype: of both parts, unless their settings say otherwise.
    """
    image: Mapping[str, Any]
    language: Mapping[str, Any]
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"
    # Not annotated, so no fields: what a subclass is made of.
    language_class = nn.Module
    patching = "grid"

    def __post_init__(self):
        # Frozen settings make models hashable, as static arguments of jit must be.
        object.__setattr__(self, "image", FrozenDict(self.image))
        object.__setattr__(self, "language", FrozenDict(self.language))
        super().__post_init__()

    def setup(self):
        self.image_tower = self._image_tower(name="image")
        self.language_model = self._language(name="language")

    def _image_tower(self, **given: Any) -> nn.Module:
        return image_tower(self, self.patching, **given)

    def _language(self, **given: Any) -> Any:
        return call(self.language_class, with_shared(self.language, self), "model.language", **given)

    def head(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `vocabulary_loss` that turn hidden states into logits."""
        return self._language(parent=None).head(params["language"])

    def parts(self) -> tuple[nn.Module, Any]:
        """The image tower and the language model, unbound: what their settings resolve to."""
        return self._image_tower(parent=None), self._language(parent=None)

    def image_tokens(self) -> int:
        """Tokens of one picture of the size that the tower is made for; with flexible patches, at most."""
        tower = self.parts()[0]
        if self.patching == "flexible":
            return tower.max_patches
        down, across = tower.grid()
        return down * across


class Projected(VisionLanguage):
    """The common part of `PrefixLM` and `Pali`, whose image tokens stand among the embeddings of the text; a subclass says in `embedded` where.

    Attributes:
      projection: a name of `visual_tokens.PROJECTIONS`: "linear" maps each of the tower's tokens, "prefix" its pooled vector to `prefix_tokens` embeddings.
    """
    projection: str = "linear"
    prefix_tokens: int = 2

    def setup(self):
        super().setup()
        self.projector = choose(PROJECTIONS, self.projection, "model.projection")(self.language_model.width, self, "projection")

    def _image_tower(self, **given: Any) -> nn.Module:
        return image_tower(self, self.patching, pooled=self.projection == "prefix", **given)

    def image_tokens(self) -> int:
        """See `VisionLanguage.image_tokens`; of a prefix its length."""
        return self.prefix_tokens if self.projection == "prefix" else super().image_tokens()

    def embedded(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[dict[str, Array], dict[str, Array]]:
        """Returns the inputs of the language model, with image tokens among the embeddings, and the tower's intermediates."""
        raise TypeError(f"{type(self).__name__} does not say where its image tokens go.")

    def __call__(self, inputs: Mapping[str, Array], train: bool = False) -> tuple[Float[Array, "B T V"], dict[str, Any]]:
        """Returns logits, float32, and the language model's intermediates with {"image": the tower's}."""
        inputs, of_image = self.embedded(inputs, train)
        logits, out = self.language_model(inputs, train)
        return logits, {**out, "image": of_image}

    def start(self, inputs: Mapping[str, Array], cache_length: int) -> tuple[Float[Array, "B V"], Cache]:
        """Reads a prompt; returns the logits of what comes next, and the cache; see `start` of the language model."""
        return self.language_model.start(self.embedded(inputs)[0], cache_length)

    def extend(self, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"] | None = None) -> tuple[Float[Array, "B T V"], Cache]:
        """Goes on with tokens of text; see `extend` of the language model."""
        return self.language_model.extend(tokens, cache, valid)
