"""What models that read pictures and write text share: a tower whose tokens get the width of the language model, and their places among the text."""
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from vlm_jax.encoders.flexible_vit import FlexibleVit, filled
from vlm_jax.encoders.image_towers import IMAGE_TOWERS, named_tower
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.nn import Linear
from vlm_jax.nn.precision import wide
from vlm_jax.settings import call, choose
from vlm_jax.sharding.activations import constrain

# patching -> the towers that take such pictures
TOWERS = {"grid": {name: IMAGE_TOWERS[name] for name in ("vit", "nfnet", "nf_resnet")}, "flexible": {"vit": (FlexibleVit, {})}}
SHARED = ("scan", "remat", "dtype", "param_dtype", "softmax_dtype")


def with_shared(settings: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Settings of a part of `model`, to which the model's own scan, remat and dtypes apply where they are silent."""
    return {**{name: getattr(model, name) for name in SHARED}, **settings}


def image_tower(model: nn.Module, patching: str = "grid", pools: bool = False, pooled: bool = False, **given: Any) -> nn.Module:
    """The tower that `model.image` describes: `tower="vit"`, "nfnet" or "nf_resnet", `variant="So400m/14"` or "F6" for the sizes of that name.

    All its tokens are read, so it does not pool; with `pools` it may, for the sake of a class token. With `pooled` its one vector is read.
    """
    tower, settings = named_tower(model.image, "tower", "model.image", choose(TOWERS, patching, "model.patching"))
    if pooled:
        settings.setdefault("pool", "gap")
        if patching != "grid" or settings["pool"] == "none":
            raise ConfigError('model.projection="prefix" maps one vector of a picture; set model.image.pool="gap", or choose projection="linear".')
    elif patching == "grid":
        settings.setdefault("pool", "none")
        if settings["pool"] != "none" and not pools:
            raise ConfigError(f'model.image.pool is "{settings["pool"]}", but the language model reads every token; leave the setting out.')
    return call(tower, with_shared(settings, model), "model.image", **given)


def projection_linear(width: int, model: nn.Module, name: str) -> nn.Module:
    """One linear map from the width of the tower to that of the language model: PaLI-X, PaLI-3, PaliGemma."""
    return Linear(width, kernel_init="lecun_normal", dtype=model.dtype, param_dtype=model.param_dtype, out_dtype=wide(model.dtype), name=name)


def projection_prefix(width: int, model: nn.Module, name: str) -> nn.Module:
    """One linear map from a pooled vector to `model.prefix_tokens` embeddings: Tsimpoukelli et al., "Frozen" (2021), section 3.1."""
    if model.prefix_tokens < 1:
        raise ConfigError(f"model.prefix_tokens is {model.prefix_tokens}; a picture needs at least 1.")
    return Linear((model.prefix_tokens, width), kernel_init="lecun_normal", dtype=model.dtype, param_dtype=model.param_dtype, out_dtype=wide(model.dtype),
                  name=name)


PROJECTIONS = {"linear": projection_linear, "prefix": projection_prefix}


def encode_images(tower: nn.Module, projection: nn.Module, inputs: Mapping[str, Array],
                  train: bool = False) -> tuple[Float[Array, "B M D"], Bool[Array, "B M"], dict[str, Array]]:
    """Turns the pictures of each example into one row of vectors for the language model.

    Args:
      inputs: `images [B, N, H, W, 3]`, or `patches [B, P, K]`, or `[B, N, P, K]` for a tower over flexible patches.
    Returns:
      the vectors of all pictures of an example, one after the other; which of them are no padding; the tower's intermediates, of B * N pictures.
    Raises:
      ConfigError: for pictures of the other kind, or with a missing axis.
    """
    flexible = isinstance(tower, FlexibleVit)
    name, axes = ("patches", 4) if flexible else ("images", 5)
    if name not in inputs:
        raise ConfigError(f'The model takes "{name}", which the inputs lack (they hold {", ".join(sorted(inputs))}); change the processor or model.image.')
    pictures = inputs[name]
    if flexible and pictures.ndim == 3:
        pictures = pictures[:, None]
    if pictures.ndim != axes:
        raise ConfigError(f'"{name}" have shape {pictures.shape}; give {axes} axes, [batch, pictures, ...], of one picture where there is one.')
    batch, number = pictures.shape[:2]
    pictures = pictures.reshape(batch * number, *pictures.shape[2:])
    tokens, out = tower(pictures, train)
    tokens = projection(tokens)
    valid = filled(pictures) if flexible else jnp.ones(tokens.shape[:2], bool)
    return tokens.reshape(batch, -1, tokens.shape[-1]), valid.reshape(batch, -1), out


def place(bank: Float[Array, "B M D"], slots: Int[Array, "B T"], embedded: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Puts the image tokens `slots` of each row into the place of embedded text; where a slot is -1 the text stays."""
    taken = jnp.take_along_axis(bank.astype(embedded.dtype), jnp.maximum(slots, 0)[..., None], axis=1, mode="clip")
    return constrain(jnp.where((slots >= 0)[..., None], taken, embedded), "batch", "sequence", "embed")


def check_slots(slots: np.ndarray, images: int, tokens_per_image: int, names: Sequence[str]) -> None:
    """Checks, on the host, that every picture of a text has all its places in it.

    Args:
      slots: [B, T], see `place`.
      images: pictures of each example; trailing ones that a text does not use may be filling.
      tokens_per_image: image tokens of one picture.
      names: what messages call each example.
    Raises:
      DataError: naming the example, both numbers and what to change.
    """
    for row, name in zip(np.asarray(slots), names, strict=True):
        used = row[row >= 0]
        pictures = -(-(int(used.max()) + 1) // tokens_per_image) if used.size else 0
        if pictures > images:
            raise DataError(f"{name}: its text has places for {pictures} pictures, but the example has {images}; add the picture, or drop its places.")
        if not np.array_equal(used, np.arange(pictures * tokens_per_image)):
            raise DataError(f"{name}: its text has {used.size} places for image tokens, its {pictures} picture(s) give {pictures * tokens_per_image}; "
                            f"set processor.format.image_tokens={tokens_per_image}, or change model.image.image_size.")
