"""Two towers and a joint space: SigLIP, SigLIP 2, CLIP and LiT.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), algorithm 1; Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision" (2021), figure 3; Zhai et al., "LiT" (2022); Tschannen et al., "SigLIP 2" (2025).
"""
from collections.abc import Mapping
import math
from typing import Any

from flax import linen as nn
from flax.core import FrozenDict
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.encoders.image_towers import named_tower, sized
from vlm_jax.encoders.text import TextTransformer
from vlm_jax.errors import ConfigError
from vlm_jax.settings import call, choose

# Initial (logit scale t', logit bias) of each loss; without a bias the model has no such parameter.
LOGITS: dict[str, tuple[float, float | None]] = {"sigmoid": (math.log(10.0), -10.0), "softmax": (math.log(1 / 0.07), None)}


class DualEncoder(nn.Module):
    """An image tower and a text tower with embeddings in one space of width `embed_dim`.

    Attributes:
      image, text: settings of `Vit` and `TextTransformer`; `variant="B/16"` stands for the sizes of that name; `kind` among those of the image is another of
        `encoders.image_towers`: "nfnet", "nf_resnet", or "naflex", a `NaflexVit` over patches [B, P, 2 + K] instead of images.
      embed_dim: width of the joint space; a tower without a projection must have that width.
      loss: "sigmoid" (logit_scale starts at log 10, logit_bias at -10) or "softmax" (logit_scale at log(1/0.07), no bias).
      logit_scale_init, logit_bias_init: other starting points.
      scan, remat: of both towers, unless their settings say otherwise.
      dtype, param_dtype, softmax_dtype: of both towers. Embeddings and the two scalars are float32.
    Raises:
      ConfigError: for settings that a tower does not take, or towers that do not meet in one width.
    """
    image: Mapping[str, Any]
    text: Mapping[str, Any]
    embed_dim: int
    loss: str = "sigmoid"
    logit_scale_init: float | None = None
    logit_bias_init: float | None = None
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    def __post_init__(self):
        # Frozen settings make models hashable and comparable, as static arguments of jit must be.
        object.__setattr__(self, "image", FrozenDict(self.image))
        object.__setattr__(self, "text", FrozenDict(self.text))
        super().__post_init__()

    def setup(self):
        scale, bias = choose(LOGITS, self.loss, "model.loss")
        scale = scale if self.logit_scale_init is None else self.logit_scale_init
        self.image_tower = self._tower("image", name="image")
        self.text_tower = self._tower("text", name="text")
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(scale), (), jnp.float32)
        if bias is None:
            if self.logit_bias_init is not None:
                raise ConfigError("model.logit_bias_init: the softmax loss has no bias; remove the setting or choose loss=\"sigmoid\".")
            self.logit_bias = None
        else:
            bias = bias if self.logit_bias_init is None else self.logit_bias_init
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(bias), (), jnp.float32)

    def _tower(self, which: str, **given: Any) -> nn.Module:
        cls, settings = named_tower(self.image, "kind", "model.image") if which == "image" else (TextTransformer, sized(self.text))
        for shared in ("scan", "remat", "dtype", "param_dtype", "softmax_dtype"):
            settings.setdefault(shared, getattr(self, shared))
        settings.setdefault("embed_dim", self.embed_dim)
        tower = call(cls, settings, f"model.{which}", **given)
        if tower.out_width != self.embed_dim:
            raise ConfigError(f"model.{which}: its embeddings are {tower.out_width} wide, the joint space is {self.embed_dim}; set model.embed_dim, or "
                              f'model.{which}.projection="linear".')
        return tower

    def __call__(self, image: Float[Array, "B H W C"], tokens: Int[Array, "B T"],
                 train: bool = False) -> tuple[tuple[Float[Array, "B D"], Float[Array, "B D"]], dict[str, Any]]:
        """Embeds pairs.

        Returns:
          (image_embedding, text_embedding), both float32 of length 1, and {"image": the image tower's intermediates, "text": the text tower's,
          "logit_scale": t', the logarithm of the factor, "logit_bias": only with the sigmoid loss}.
        """
        image_embedding, of_image = self.encode_image(image, train)
        text_embedding, of_text = self.encode_text(tokens, train)
        intermediates = {"image": of_image, "text": of_text, "logit_scale": self.logit_scale}
        if self.logit_bias is not None:
            intermediates["logit_bias"] = self.logit_bias
        return (image_embedding, text_embedding), intermediates

    def encode_image(self, image: Float[Array, "B H W C"], train: bool = False) -> tuple[Float[Array, "B D"], dict[str, Any]]:
        """Returns the embeddings of images, float32 of length 1, and the intermediates of `Vit` ("pooled" is what a linear probe reads)."""
        embedding, intermediates = self.image_tower(image, train)
        return normalize(embedding), intermediates

    def encode_text(self, tokens: Int[Array, "B T"], train: bool = False) -> tuple[Float[Array, "B D"], dict[str, Any]]:
        """Returns the embeddings of texts, float32 of length 1, and the intermediates of `TextTransformer`."""
        embedding, intermediates = self.text_tower(tokens, train)
        return normalize(embedding), intermediates

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"image": (height, width, channels), "tokens": (length,)} of one example."""
        image, text = self.towers()
        return {"image": image.input_shape(), "tokens": text.input_shape()}

    def towers(self) -> tuple[nn.Module, nn.Module]:
        """The image and the text tower, unbound: their attributes are the settings after variants and defaults."""
        return self._tower("image", parent=None), self._tower("text", parent=None)


def normalize(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """x divided by its length, in float32; a vector of zeros stays zero and passes a finite gradient."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-16))


def parameter_count(model: DualEncoder) -> int:
    """The number of parameters, from shapes alone."""
    shapes = model.input_shapes()
    image = jax.ShapeDtypeStruct((1, *shapes["image"]), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, *shapes["tokens"]), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), image, tokens)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
