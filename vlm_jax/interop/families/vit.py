"""ViT: ViTModel and ViTForImageClassification of transformers. Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021)."""
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_DEPTH, MAX_WIDTH, Section
from vlm_jax.interop.families import Family
from vlm_jax.interop.families.parts import activation, activation_out, conv_stem, dense, expect, from_heads, image_config, image_settings, norm, to_heads
from vlm_jax.interop.table import Ignored, Row, Rows
from vlm_jax.interop.transforms import first_axis

CLASSES = ("ViTModel", "ViTForImageClassification")
MAX_LABELS = 2 ** 20
POOLER = "pooler.dense.weight"


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> `Vit`: the class token's state, through the pooler (a tanh) of ViTModel or the classifier."""
    section = Section(config)
    architecture = section.architecture(CLASSES) or "ViTModel"
    section.require("qkv_bias", True, True, "the projections of our ViT have biases")
    width = section.integer("hidden_size", 768, most=MAX_WIDTH)
    if architecture == "ViTModel":
        section.require("pooler_act", "tanh", "tanh", "our pooler ends in a tanh")
        projection = dict(projection="linear_tanh", embed_dim=section.integer("pooler_output_size", width, most=MAX_WIDTH))
    else:
        projection = dict(projection="linear", embed_dim=labels(section))
    return dict(name="vit", width=width, depth=section.integer("num_hidden_layers", 12, most=MAX_DEPTH), num_heads=section.heads(width, default=12),
                mlp_dim=section.integer("intermediate_size", 3072, most=8 * MAX_WIDTH), norm_eps=section.number("layer_norm_eps", 1e-12, 0.0, 1.0),
                activation=activation(section, "hidden_act", "gelu"), pool="cls", **image_settings(section), **projection)


def labels(section: Section) -> int:
    """How many classes a config names."""
    named = section.values.get("id2label")
    if named is None:
        return section.integer("num_labels", 2, most=MAX_LABELS)
    if not isinstance(named, Mapping) or not 1 <= len(named) <= MAX_LABELS:
        raise ConfigError(f"{section.where}.id2label must map 1 to {MAX_LABELS:,} numbers to names; fetch the file again.")
    return len(named)


def by_tensors(settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A ViTModel may be stored without its pooler; the config does not say so."""
    if settings["projection"] == "linear_tanh" and not any(name.endswith(POOLER) for name in names):
        return {**settings, "projection": None, "embed_dim": None}
    return settings


def to_config(model: Any) -> dict[str, Any]:
    """The inverse of `to_settings`."""
    expect("ViTModel", vars(model), dict(pool="cls", positions="learned", patch_bias=True, norm_before=False, projection=(None, "linear", "linear_tanh")))
    config = dict(model_type="vit", architectures=[CLASSES[model.projection == "linear"]], hidden_size=model.width, num_hidden_layers=model.depth,
                  num_attention_heads=model.num_heads, intermediate_size=model.mlp_dim, layer_norm_eps=model.norm_eps,
                  hidden_act=activation_out(model.activation), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, qkv_bias=True, **image_config(model))
    if model.projection == "linear":
        names = {str(k): f"LABEL_{k}" for k in range(model.embed_dim)}
        return dict(config, id2label=names, label2id={name: int(k) for k, name in names.items()})
    return dict(config, pooler_act="tanh", pooler_output_size=model.embed_dim or model.width)


def rows(model: Any) -> Rows:
    """The table of `to_settings`' model."""
    layer, blocks = "vit.encoder.layer.{i}", "blocks"
    table = [Row("vit.embeddings.cls_token", "class_token", first_axis), Row("vit.embeddings.position_embeddings", "position_embedding", first_axis),
             *conv_stem("vit.embeddings.patch_embeddings.projection", "patch_embedding"),
             *norm(f"{layer}.layernorm_before", f"{blocks}/norm_attention"), *norm(f"{layer}.layernorm_after", f"{blocks}/norm_mlp"),
             *from_heads(f"{layer}.attention.output.dense", f"{blocks}/attention/out", model.num_heads),
             *dense(f"{layer}.intermediate.dense", f"{blocks}/mlp/up"), *dense(f"{layer}.output.dense", f"{blocks}/mlp/down"),
             *norm("vit.layernorm", "norm"), Ignored(r"vit\.embeddings\.mask_token")]
    for name in ("query", "key", "value"):
        table += to_heads(f"{layer}.attention.attention.{name}", f"{blocks}/attention/{name}", model.num_heads)
    if model.projection == "linear":
        return [*table, *dense("classifier", "projection"), Ignored(r"vit\.pooler\.dense\.(weight|bias)")]
    return [*table, *(dense("vit.pooler.dense", "projection") if model.projection else [])]


# Names that transformers 5 has in memory -> those of its files
RENAMES = (*((rf"^(vit\.)?layers\.(\d+)\.attention\.{letter}_proj\.", rf"\1encoder.layer.\2.attention.attention.{name}.")
             for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))),
           (r"^(vit\.)?layers\.(\d+)\.attention\.o_proj\.", r"\1encoder.layer.\2.attention.output.dense."),
           (r"^(vit\.)?layers\.(\d+)\.mlp\.fc1\.", r"\1encoder.layer.\2.intermediate.dense."),
           (r"^(vit\.)?layers\.(\d+)\.mlp\.fc2\.", r"\1encoder.layer.\2.output.dense."),
           (r"^(vit\.)?layers\.(\d+)\.", r"\1encoder.layer.\2."))

FAMILY = Family(("vit",), to_settings, to_config, rows, by_tensors, "vit.", RENAMES)
