"""IdeficsForVisionText2Text of transformers: CLIP's tower, a Perceiver Resampler, and Llama with gated cross-attention between its layers.

Laurençon et al., "OBELICS" (2023). The class freezes parts of itself and draws its gates by settings that no computation reads (freeze_*, alpha_initializer);
files keep what they say of them. Dropout is for training in that library and is not taken over.
"""
from collections.abc import Collection, Mapping
import re
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_DEPTH, MAX_HEADS, MAX_LENGTH, MAX_WIDTH, Section
from vlm_jax.interop.families import Family, clip, language_config as common, llama, parts
from vlm_jax.interop.families.paligemma import nested
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_in, heads_out, linear, reshape, scalar
from vlm_jax.nn.stack import inserted_places

CLASS = "IdeficsForVisionText2Text"
GATES = {"float": "scalar", "vector": "vector"}     # alpha_type -> gate
INITIALIZERS = {"zeros": 0.0, "ones": 1.0, "normal": 0.0, "gaussian": 0.0, "random": 0.0}    # alpha_initializer -> the mean of the gates at the start
RESAMPLER_EPS = 1e-5    # of the layer norms of the resampler, which no config says
# What the language model shares with a Llama, by the same names.
LANGUAGE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "rms_norm_eps",
            "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "quantization_config", "per_layer_config")
DEFAULTS = dict(vocab_size=32_000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11_008)


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `CrossAttentionLM`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = Section(config)
    section.text("model_type", among=("idefics",))
    said = {key: config[key] for key in LANGUAGE if config.get(key) is not None}
    language = {name: value for name, value in llama.to_settings({**DEFAULTS, **said, "model_type": "llama"}).items() if name != "name"}
    common.dividing_heads(section, language["width"], language["num_heads"], "num_attention_heads")
    language["new_tokens"] = section.integer("additional_vocab_size", 0, least=0)
    section.text("alpha_initializer", "zeros", among=INITIALIZERS)
    gated = dict(every=section.integer("cross_layer_interval", 1, most=language["depth"]), num_heads=language["num_heads"], mlp_dim=language["mlp_dim"],
                 norm="rms", norm_eps=language["norm_eps"], norm_media=False, activation=language["activation"], gated=True,
                 qk_norm="rms" if section.flag("qk_layer_norms", False) else None, gate=GATES[section.text("alpha_type", "float", among=GATES)],
                 gate_init=INITIALIZERS[section.text("alpha_initializer", "zeros")])
    return {"name": "idefics", "image": _image(section.section("vision_config", {})), "image_features": "unnormalised_with_class", "language": language,
            "gated": gated, **({"resampler": _resampler(section.section("perceiver_config", {}))} if section.flag("use_resampler", False) else {})}


def _image(section: Section) -> dict[str, Any]:
    """Settings of the tower; files call its width embed_dim."""
    named = Section({**section.values, "hidden_size": section.values.get("embed_dim", section.values.get("hidden_size"))}, section.where)
    return dict(**parts.tower_settings(named, "gelu", 1e-5, 768, 5120, 32, 16), **parts.image_settings(section, patch_size=14) | {"resample": "bicubic_dino"},
                pool="cls", patch_bias=False, norm_before=True)


def _resampler(section: Section) -> dict[str, Any]:
    return dict(num_latents=section.integer("resampler_n_latents", 64, most=MAX_LENGTH), depth=section.integer("resampler_depth", 6, most=MAX_DEPTH),
                num_heads=section.integer("resampler_n_heads", 16, most=MAX_HEADS), head_dim=section.integer("resampler_head_dim", 96, most=MAX_WIDTH),
                activation="relu", qk_norm="layer" if section.flag("qk_layer_norms_perceiver", False) else None, frame_embedding=False,
                norm_eps=RESAMPLER_EPS)


def by_tensors(settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The settings, unless the class itself lacks a block: it counts depth // cross_layer_interval of them and reads one more where that leaves a rest.

    Raises:
      ConfigError: for such a file.
    """
    depth, every = settings["language"]["depth"], settings["gated"]["every"]
    found = {match[1] for name in names if (match := re.match(r"(?:model\.)?gated_cross_attn_layers\.(\d+)\.", name))}
    if depth % every and len(found) < len(inserted_places(depth, every)):
        raise ConfigError(f"config.json.cross_layer_interval: {every} does not divide num_hidden_layers={depth}, and the file has {len(found)} gated blocks "
                          f"for {len(inserted_places(depth, every))} places, so not even {CLASS} can run it; choose an interval that divides the layers.")
    return settings


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a `CrossAttentionLM`.

    Raises:
      ConfigError: naming a setting that the class does not have.
    """
    tower, decoder = model.parts()
    gated = model.gated_settings()
    text = llama.to_config(decoder)
    head_dim = decoder.width // decoder.num_heads
    common.refuse(decoder, "idefics", biases=(), num_kv_heads=[None, decoder.num_heads], head_dim=[None, head_dim])
    if text["model_type"] != "llama":
        raise ConfigError(f"{CLASS}: its language model is a llama, not of the kind {text['model_type']}; write it as a workdir instead.")
    parts.expect(f"{CLASS}: model", vars(model), {"image_features": "unnormalised_with_class"})
    parts.expect(f"{CLASS}: model.image", vars(tower), dict(pool="cls", positions="learned", patch_bias=False, norm_before=True, projection=None))
    parts.expect(f"{CLASS}: model.gated", gated, dict(
        first=0, num_heads=decoder.num_heads, head_dim=(None, head_dim), mlp_dim=decoder.mlp_dim, norm="rms", norm_eps=decoder.norm_eps, norm_media=False,
        activation=decoder.activation, gated=True, biases=((),), qk_norm=(None, "rms"), all_previous=False))
    if decoder.depth % gated["every"]:
        raise ConfigError(f"{CLASS}: model.gated.every={gated['every']} does not divide the {decoder.depth} layers, which the class cannot run; choose a "
                          "divisor, or write it as a workdir instead.")
    if len(set(tower.grid())) > 1:
        raise ConfigError(f"model.image.image_size: a grid of {tower.grid()} patches cannot be written as idefics, which has squares.")
    vision = parts.tower_config(tower) | parts.image_config(tower)
    vision["embed_dim"] = vision.pop("hidden_size")
    kept = {key: text[key] for key in LANGUAGE if key in text}
    return {"model_type": "idefics", "architectures": [CLASS], **kept, "additional_vocab_size": decoder.new_tokens, "cross_layer_interval": gated["every"],
            "qk_layer_norms": gated["qk_norm"] is not None, "alpha_type": {ours: theirs for theirs, ours in GATES.items()}[gated["gate"]],
            "use_resampler": model.resampler is not None, "vision_config": {"model_type": "idefics_vision", **vision},
            "perceiver_config": _resampler_config(model)}


def _resampler_config(model: Any) -> dict[str, Any]:
    if model.resampler is None:
        return {}
    resampler = model.connector()
    parts.expect(f"{CLASS}: model.resampler", vars(resampler), dict(activation="relu", mlp_ratio=4, width=None, frame_embedding=False, norm_eps=RESAMPLER_EPS))
    return dict(resampler_n_latents=resampler.num_latents, resampler_depth=resampler.depth, resampler_n_heads=resampler.num_heads,
                resampler_head_dim=resampler.head_dim, qk_layer_norms_perceiver=resampler.qk_norm is not None)


def rows(model: Any) -> Rows:
    """The weight table."""
    tower, decoder = model.parts()
    table = [*nested(clip.vision_rows("image/", tower), "model.", ""), *nested(llama.rows(decoder), "", "language/"), *gated_rows(model),
             Ignored(r"model\.vision_model\.embeddings\.position_ids"), Ignored(r"model\.gated_cross_attn_layers\.\d+\.cross_attn\.rotary_emb\.inv_freq")]
    if model.resampler is not None:
        table += resampler_rows(model.connector())
    if decoder.new_tokens:
        new = "model.embed_tokens.additional_embedding.weight"
        table += [Row(new, "language/new_embedding"),
                  Tied("lm_head.additional_fc.weight", new) if decoder.tied else Row("lm_head.additional_fc.weight", "language/new_head/kernel", linear)]
    return table


def gated_rows(model: Any) -> Rows:
    """The table of the gated blocks."""
    settings = model.gated_settings()
    heads, layer, ours = settings["num_heads"], "model.gated_cross_attn_layers.{i}.", "gated/blocks/"
    gate = scalar if settings["gate"] == "scalar" else reshape((1, 1, -1), (-1,))
    attention = [Row(f"{layer}cross_attn.{name[0]}_proj.weight", f"{ours}cross_attention/{name}/kernel", heads_out(heads)) for name in common.ATTENTION]
    norms = [Row(f"{layer}cross_attn.{name[0]}_layer_norm.weight", f"{ours}cross_attention/{name}_norm/scale") for name in ("query", "key")]
    return [*attention, *(norms if settings["qk_norm"] else []), Row(f"{layer}cross_attn.o_proj.weight", f"{ours}cross_attention/out/kernel", heads_in(heads)),
            *(Row(f"{layer}mlp.{name}_proj.weight", f"{ours}mlp/{name}/kernel", linear) for name in ("gate", "up", "down")),
            Row(f"{layer}input_layernorm.weight", f"{ours}norm_cross/scale"), Row(f"{layer}post_attention_layernorm.weight", f"{ours}norm_mlp/scale"),
            Row(f"{layer}alpha_cross_attn", f"{ours}gate_cross", gate), Row(f"{layer}alpha_dense", f"{ours}gate_mlp", gate)]


def resampler_rows(resampler: Any) -> Rows:
    """The table of the resampler."""
    theirs, heads = "model.perceiver_resampler", resampler.num_heads
    attention, ours = theirs + ".blocks.{i}.0.", "resampler/blocks/attention/"
    table = [Row(f"{theirs}.latents", "resampler/latents"), *parts.norm(f"{theirs}.layer_norm", "resampler/norm"),
             *parts.norm(f"{attention}context_layer_norm", f"{ours}norm_features"), *parts.norm(f"{attention}latents_layer_norm", f"{ours}norm_latents")]
    for name in common.ATTENTION:
        table += parts.to_heads(f"{attention}{name[0]}_proj", f"{ours}{name}", heads, bias=False)
        if resampler.qk_norm and name != "value":
            table += parts.norm(f"{attention}{name[0]}_layer_norm", f"{ours}{name}_norm")
    mlp = theirs + ".blocks.{i}.1."
    return [*table, *parts.from_heads(f"{attention}output_proj", f"{ours}out", heads, bias=False), *parts.norm(f"{mlp}ln", "resampler/blocks/norm_mlp"),
            *parts.dense(f"{mlp}fc", "resampler/blocks/mlp/up", bias=False), *parts.dense(f"{mlp}c_proj", "resampler/blocks/mlp/down", bias=False)]


FAMILY = Family(("idefics",), to_settings, to_config, rows, by_tensors, prefix="model.")
