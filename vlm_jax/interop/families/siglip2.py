"""SigLIP 2 with native aspect ratios (NaFlex): Siglip2Model, Siglip2VisionModel of transformers. Those at fixed resolution are SigLIP's classes.

Tschannen et al., "SigLIP 2" (2025), section 2.4.
"""
from collections.abc import Mapping
import math
from typing import Any

from vlm_jax.encoders.naflex_vit import NaflexVit
from vlm_jax.encoders.text import TextTransformer
from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_PIXELS, Section
from vlm_jax.interop.families import Family, siglip
from vlm_jax.interop.families.parts import dense, expect, tower_config, tower_settings
from vlm_jax.interop.table import Row, Rows
from vlm_jax.interop.transforms import linear_patches, scalar

CLASSES = ("Siglip2Model", "Siglip2VisionModel", "Siglip2TextModel")
MAX_POSITIONS = 2 ** 16


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> the dual encoder, or one of its towers."""
    section = Section(config)
    section.architecture(CLASSES)
    kind = section.text("model_type")
    if kind == "siglip2_vision_model":
        return dict(name="naflex_vit", **vision(section))
    if kind == "siglip2_text_model":
        return dict(name="text", **siglip.text(section))
    image, texts = vision(section.section("vision_config", {})), siglip.text(section.section("text_config", {}))
    siglip.meet(image, texts)
    return dict(name="siglip2", image=dict(kind="naflex", **image), text=texts, embed_dim=texts["embed_dim"])


def vision(section: Section) -> dict[str, Any]:
    """Settings of `NaflexVit` from a vision config."""
    positions = section.integer("num_patches", 256, most=MAX_POSITIONS)
    if math.isqrt(positions) ** 2 != positions:
        raise ConfigError(f"{section.where}.num_patches: {positions} is no square number; fetch the file again.")
    return dict(**tower_settings(section), max_patches=positions, num_positions=positions, patch_size=section.integer("patch_size", 16, most=MAX_PIXELS),
                channels=section.integer("num_channels", 3, most=64), pool="map" if section.flag("vision_use_head", True) else "none")


def to_config(model: Any) -> dict[str, Any]:
    """The inverse of `to_settings`."""
    if isinstance(model, NaflexVit):
        return dict(model_type="siglip2_vision_model", architectures=["Siglip2VisionModel"], **vision_config(model))
    if isinstance(model, TextTransformer):
        return dict(model_type="siglip2_text_model", architectures=["Siglip2TextModel"], **siglip.text_config(model))
    image, texts = model.towers()
    if not isinstance(image, NaflexVit):
        return siglip.to_config(model)   # SigLIP 2 at fixed resolution
    expect("Siglip2Model", {"loss": model.loss}, {"loss": "sigmoid"})
    return dict(model_type="siglip2", architectures=["Siglip2Model"], vision_config=dict(model_type="siglip2_vision_model", **vision_config(image)),
                text_config=dict(model_type="siglip2_text_model", **siglip.text_config(texts)))


def vision_config(tower: Any) -> dict[str, Any]:
    """The vision config of a tower."""
    expect("Siglip2VisionModel", vars(tower), dict(pool=("map", "none"), projection=None))
    return dict(**tower_config(tower), num_patches=tower.num_positions, patch_size=tower.patch_size, num_channels=tower.channels,
                vision_use_head=tower.pool == "map")


def rows(model: Any) -> Rows:
    """The table of `to_settings`' model."""
    if isinstance(model, NaflexVit):
        return [*vision_rows("", model), siglip.BUFFERS]
    if isinstance(model, TextTransformer):
        return [*siglip.text_rows("text_model", "", model), siglip.BUFFERS]
    image, texts = model.towers()
    if not isinstance(image, NaflexVit):
        return siglip.rows(model)
    return [*vision_rows("image/", image), *siglip.text_rows("text_model", "text/", texts), Row("logit_scale", "logit_scale", scalar),
            Row("logit_bias", "logit_bias", scalar), siglip.BUFFERS]


def vision_rows(ours: str, tower: Any) -> list[Row]:
    """SigLIP's rows with a linear map of flattened patches in the place of the convolution."""
    stem = dense("vision_model.embeddings.patch_embedding", f"{ours}patch_embedding", kernel=linear_patches(tower.patch_size, tower.channels))
    return siglip.vision_rows("vision_model", ours, tower, stem)


def prefix(model: Any) -> str:
    """What names begin with in older files of a tower alone."""
    return {NaflexVit: "vision_model.", TextTransformer: "text_model."}.get(type(model), "")


FAMILY = Family(("siglip2", "siglip2_vision_model", "siglip2_text_model"), to_settings, to_config, rows, prefix=prefix)
