"""SigLIP, and SigLIP 2 at fixed resolution: SiglipModel, SiglipVisionModel, SiglipTextModel of transformers.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
"""
from collections.abc import Mapping
from typing import Any

from vlm_jax.encoders.text import TextTransformer
from vlm_jax.encoders.vit import Vit
from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_WIDTH, Section
from vlm_jax.interop.families import Family
from vlm_jax.interop.families.parts import (
    clip_layers,
    conv_stem,
    dense,
    expect,
    from_heads,
    image_config,
    image_settings,
    norm,
    text_settings,
    tower_config,
    tower_settings,
)
from vlm_jax.interop.table import Ignored, Row, Rows
from vlm_jax.interop.transforms import first_axis, qkv, qkv_bias, scalar

CLASSES = {"SiglipModel": "siglip", "SiglipVisionModel": "siglip_vision_model", "SiglipTextModel": "siglip_text_model"}


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> the dual encoder, or one of its towers."""
    section = Section(config)
    section.architecture(CLASSES)
    kind = section.text("model_type")
    if kind == "siglip_vision_model":
        return dict(name="vit", **vision(section))
    if kind == "siglip_text_model":
        return dict(name="text", **text(section))
    image, texts = vision(section.section("vision_config", {})), text(section.section("text_config", {}))
    meet(image, texts)
    return dict(name="siglip", image=image, text=texts, embed_dim=texts["embed_dim"])


def meet(image: Mapping[str, Any], texts: Mapping[str, Any]) -> None:
    """Raises a ConfigError unless both towers give one vector of the same width."""
    if image["pool"] != "map":
        raise ConfigError("config.json.vision_config.vision_use_head: false leaves the image tower without an embedding; load it as a vision model.")
    if image["width"] != texts["embed_dim"]:
        raise ConfigError(f"config.json.text_config.projection_size: {texts['embed_dim']} is not the width {image['width']} of the images; "
                          "fetch the file again.")


def vision(section: Section) -> dict[str, Any]:
    """Settings of `Vit` from a vision config."""
    return dict(**tower_settings(section), **image_settings(section), pool="map" if section.flag("vision_use_head", True) else "none")


def text(section: Section) -> dict[str, Any]:
    """Settings of `TextTransformer` from a text config."""
    sizes = tower_settings(section)
    return dict(**sizes, **text_settings(section, 32_000, 64), pool="last", projection="linear",
                embed_dim=section.integer("projection_size", sizes["width"], most=MAX_WIDTH))


def to_config(model: Any) -> dict[str, Any]:
    """The inverse of `to_settings`."""
    if isinstance(model, Vit):
        return dict(model_type="siglip_vision_model", architectures=["SiglipVisionModel"], **vision_config(model))
    if isinstance(model, TextTransformer):
        return dict(model_type="siglip_text_model", architectures=["SiglipTextModel"], **text_config(model))
    image, texts = model.towers()
    expect("SiglipModel", {"loss": model.loss}, {"loss": "sigmoid"})
    return dict(model_type="siglip", architectures=["SiglipModel"],
                vision_config=dict(model_type="siglip_vision_model", **vision_config(image)),
                text_config=dict(model_type="siglip_text_model", **text_config(texts)))


def vision_config(tower: Any) -> dict[str, Any]:
    """The vision config of a tower."""
    expect("SiglipVisionModel", vars(tower), dict(pool=("map", "none"), positions="learned", patch_bias=True, norm_before=False, projection=None))
    height, width, _ = tower.input_shape()
    if height // tower.patch_size != width // tower.patch_size:
        raise ConfigError(f"SiglipVisionModel: images of {height} x {width}; this layout has square ones only; write it as a workdir instead.")
    return dict(**tower_config(tower), **image_config(tower), vision_use_head=tower.pool == "map")


def text_config(tower: Any) -> dict[str, Any]:
    """The text config of a tower."""
    expect("SiglipTextModel", vars(tower), dict(pool="last", causal=False, projection="linear"))
    return dict(**tower_config(tower), vocab_size=tower.vocab_size, max_position_embeddings=tower.length, projection_size=tower.embed_dim)


def rows(model: Any) -> Rows:
    """The table of `to_settings`' model."""
    if isinstance(model, Vit):
        return [*vision_rows("vision_model", "", model), BUFFERS]
    if isinstance(model, TextTransformer):
        return [*text_rows("text_model", "", model), BUFFERS]
    image, texts = model.towers()
    return [*vision_rows("vision_model", "image/", image), *text_rows("text_model", "text/", texts),
            Row("logit_scale", "logit_scale", scalar), Row("logit_bias", "logit_bias", scalar), BUFFERS]


BUFFERS = Ignored(r"(vision_model\.|text_model\.)?embeddings\.position_ids")


def vision_rows(theirs: str, ours: str, tower: Any, stem: list[Row] | None = None) -> list[Row]:
    """The table of an image tower; `stem` replaces the rows of the patch embedding."""
    stem = conv_stem(f"{theirs}.embeddings.patch_embedding", f"{ours}patch_embedding") if stem is None else stem
    table = [*stem, Row(f"{theirs}.embeddings.position_embedding.weight", f"{ours}position_embedding"),
             *clip_layers(f"{theirs}.encoder", ours.rstrip("/"), tower.num_heads), *norm(f"{theirs}.post_layernorm", f"{ours}norm")]
    if tower.pool != "map":
        return table
    head, pooling, head_dim = f"{theirs}.head", f"{ours}pooling", tower.width // tower.num_heads
    parts = ("query", "key", "value")
    return [*table, Row(f"{head}.probe", f"{pooling}/probe", first_axis),
            Row(f"{head}.attention.in_proj_weight", tuple(f"{pooling}/{part}/kernel" for part in parts), qkv(tower.num_heads, head_dim)),
            Row(f"{head}.attention.in_proj_bias", tuple(f"{pooling}/{part}/bias" for part in parts), qkv_bias(tower.num_heads, head_dim)),
            *from_heads(f"{head}.attention.out_proj", f"{pooling}/out", tower.num_heads), *norm(f"{head}.layernorm", f"{pooling}/norm"),
            *dense(f"{head}.mlp.fc1", f"{pooling}/mlp/up"), *dense(f"{head}.mlp.fc2", f"{pooling}/mlp/down")]


def text_rows(theirs: str, ours: str, tower: Any) -> list[Row]:
    """The table of a text tower."""
    return [Row(f"{theirs}.embeddings.token_embedding.weight", f"{ours}token_embedding"),
            Row(f"{theirs}.embeddings.position_embedding.weight", f"{ours}position_embedding"),
            *clip_layers(f"{theirs}.encoder", ours.rstrip("/"), tower.num_heads), *norm(f"{theirs}.final_layer_norm", f"{ours}norm"),
            *dense(f"{theirs}.head", f"{ours}projection")]


def prefix(model: Any) -> str:
    """What names begin with in older files of a tower alone."""
    return {Vit: "vision_model.", TextTransformer: "text_model."}.get(type(model), "")


FAMILY = Family(("siglip", "siglip_vision_model", "siglip_text_model"), to_settings, to_config, rows, prefix=prefix)
