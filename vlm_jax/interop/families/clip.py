"""CLIP: CLIPModel, and its towers with and without projection, of transformers.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
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
    image_config,
    image_settings,
    norm,
    text_settings,
    tower_config,
    tower_settings,
)
from vlm_jax.interop.table import Ignored, Row, Rows
from vlm_jax.interop.transforms import reshape

PROJECTED = ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection")
CLASSES = ("CLIPModel", "CLIPTextModel", "CLIPVisionModel", *PROJECTED)
OLD_EOS = 2   # configs written before the end mark was read from them; the class then takes the highest id
BUFFERS = Ignored(r"((vision_model|text_model)\.)?embeddings\.position_ids")


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> the dual encoder, or one of its towers."""
    section = Section(config)
    architecture = section.architecture(CLASSES)
    kind = section.text("model_type")
    if kind != "clip":
        projection = section.integer("projection_dim", 512, most=MAX_WIDTH) if architecture in PROJECTED else None
        return dict(name="text", **text(section, projection)) if kind == "clip_text_model" else dict(name="vit", **vision(section, projection))
    embed_dim = section.integer("projection_dim", 512, most=MAX_WIDTH)
    return dict(name="clip", image=vision(_tower(section, "vision_config"), embed_dim), text=text(_tower(section, "text_config"), embed_dim),
                embed_dim=embed_dim, loss="softmax")


def _tower(section: Section, key: str) -> Section:
    """A tower's section; in older files `..._dict` beside it wins, as it does in the reference."""
    return section.section(f"{key}_dict" if f"{key}_dict" in section else key, {})


def vision(section: Section, projection: int | None) -> dict[str, Any]:
    """Settings of `Vit` from a vision config."""
    return dict(**tower_settings(section, "quick_gelu", 1e-5), **image_settings(section, patch_size=32), pool="cls", patch_bias=False, norm_before=True,
                **_projection(projection))


def text(section: Section, projection: int | None) -> dict[str, Any]:
    """Settings of `TextTransformer` from a text config."""
    eos = section.integer("eos_token_id", 49_407, least=0)
    pool = dict(pool="argmax") if eos == OLD_EOS else dict(pool="eot_or_first", eot_id=eos)
    return dict(**tower_settings(section, "quick_gelu", 1e-5, 512, 2048, 12, 8), **text_settings(section, 49_408, 77), **pool, causal=True,
                initialization="clip", **_projection(projection))


def _projection(width: int | None) -> dict[str, Any]:
    return dict(projection=None) if width is None else dict(projection="linear_no_bias", embed_dim=width)


def to_config(model: Any) -> dict[str, Any]:
    """The inverse of `to_settings`."""
    if isinstance(model, Vit):
        return dict(model_type="clip_vision_model", architectures=["CLIPVisionModel" + "WithProjection" * bool(model.projection)], **vision_config(model))
    if isinstance(model, TextTransformer):
        return dict(model_type="clip_text_model", architectures=["CLIPTextModel" + "WithProjection" * bool(model.projection)], **text_config(model))
    image, texts = model.towers()
    expect("CLIPModel", {"loss": model.loss}, {"loss": "softmax"})
    for tower in (image, texts):
        expect("CLIPModel", vars(tower), {"projection": "linear_no_bias"})
    return dict(model_type="clip", architectures=["CLIPModel"], projection_dim=model.embed_dim, vision_config_dict=None, text_config_dict=None,
                vision_config=dict(model_type="clip_vision_model", **vision_config(image, alone=False)),
                text_config=dict(model_type="clip_text_model", **text_config(texts, alone=False)))


def vision_config(tower: Any, alone: bool = True) -> dict[str, Any]:
    """The vision config of a tower; of one `alone` with its projection."""
    expect("CLIPVisionModel", vars(tower), dict(pool="cls", positions="learned", patch_bias=False, norm_before=True, projection=(None, "linear_no_bias")))
    height, width, _ = tower.input_shape()
    if height // tower.patch_size != width // tower.patch_size:
        raise ConfigError(f"CLIPVisionModel: images of {height} x {width}; this layout has square ones only; write it as a workdir instead.")
    return dict(**tower_config(tower), **image_config(tower), **({"projection_dim": tower.embed_dim} if alone and tower.projection else {}))


def text_config(tower: Any, alone: bool = True) -> dict[str, Any]:
    """The text config of a tower; of one `alone` with its projection."""
    expect("CLIPTextModel", vars(tower), dict(pool=("eot", "eot_or_first", "argmax"), causal=True, projection=(None, "linear_no_bias")))
    if tower.pool != "argmax" and tower.eot_id == OLD_EOS:
        raise ConfigError(f"CLIPTextModel: eot_id {OLD_EOS} means the highest id in this layout; use another end mark or write it as a workdir instead.")
    return dict(**tower_config(tower), vocab_size=tower.vocab_size, max_position_embeddings=tower.length,
                eos_token_id=OLD_EOS if tower.pool == "argmax" else tower.eot_id, **({"projection_dim": tower.embed_dim} if alone and tower.projection else {}))


def rows(model: Any) -> Rows:
    """The table of `to_settings`' model."""
    if isinstance(model, Vit):
        return [*vision_rows("", model), BUFFERS]
    if isinstance(model, TextTransformer):
        return [*text_rows("", model), BUFFERS]
    image, texts = model.towers()
    return [*vision_rows("image/", image), *text_rows("text/", texts), Row("logit_scale", "logit_scale"), BUFFERS]


def vision_rows(ours: str, tower: Any) -> list[Row]:
    """The table of an image tower."""
    theirs = "vision_model"
    return [*conv_stem(f"{theirs}.embeddings.patch_embedding", f"{ours}patch_embedding", bias=False),
            Row(f"{theirs}.embeddings.class_embedding", f"{ours}class_token", reshape((-1,), (1, -1))),
            Row(f"{theirs}.embeddings.position_embedding.weight", f"{ours}position_embedding"), *norm(f"{theirs}.pre_layrnorm", f"{ours}norm_before"),
            *clip_layers(f"{theirs}.encoder", ours.rstrip("/"), tower.num_heads), *norm(f"{theirs}.post_layernorm", f"{ours}norm"),
            *(dense("visual_projection", f"{ours}projection", bias=False) if tower.projection else [])]


def text_rows(ours: str, tower: Any) -> list[Row]:
    """The table of a text tower."""
    theirs = "text_model"
    return [Row(f"{theirs}.embeddings.token_embedding.weight", f"{ours}token_embedding"),
            Row(f"{theirs}.embeddings.position_embedding.weight", f"{ours}position_embedding"),
            *clip_layers(f"{theirs}.encoder", ours.rstrip("/"), tower.num_heads), *norm(f"{theirs}.final_layer_norm", f"{ours}norm"),
            *(dense("text_projection", f"{ours}projection", bias=False) if tower.projection else [])]


def prefix(model: Any) -> str:
    """What names begin with in files of a tower with projection, and in older ones."""
    return {Vit: "vision_model.", TextTransformer: "text_model."}.get(type(model), "")


FAMILY = Family(("clip", "clip_vision_model", "clip_text_model"), to_settings, to_config, rows, prefix=prefix)
