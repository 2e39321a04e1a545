"""MPT: ALiBi, no biases, queries, keys and values in one kernel, an MLP of four widths and the exact GELU.

transformers computes this whatever config.json says of no_bias, learned_pos_emb, expansion_ratio, attn_type, qk_ln, attn_uses_sequence_id and norm_type;
weights of a model that is otherwise do not fit the table. What no weight would show (alibi, alibi_bias_max, prefix_lm, logit_scale) is refused.

mosaic_gpt, the first of them (MPT-1B, which no class of transformers reads), says attention's settings without a section, calls some parts otherwise, and may
normalise queries and keys over all heads together. It is read, and not written.
"""
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.families import NULL, Family, language_config as common
from vlm_jax.interop.safetensors import show
from vlm_jax.interop.table import Row, Rows, Tied
from vlm_jax.interop.transforms import heads_in, linear, qkv


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Decoder`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, ("mpt", "mosaic_gpt"))
    if section.text("model_type") == "mosaic_gpt":
        section.require("mlp_ratio", 4, 4, "an MLP of four widths is computed here")
        attention = {key: section.values.get(f"attn_{key}" if key == "clip_qkv" else key) for key in
                     ("alibi", "alibi_bias_max", "prefix_lm", "clip_qkv", "softmax_scale")}
        whole = section.flag("attn_qk_ln", False)
        settings = to_settings({**config, "model_type": "mpt", "attn_config": {**attention, "alibi": bool(attention["alibi"])}})
        return {**settings, **({"qk_norm": "layer_no_bias", "qk_norm_whole": True} if whole else {})}
    size = common.sizes(section, {"width": "d_model", "depth": "n_layers", "num_heads": "n_heads"})
    common.dividing_heads(section, size["width"], size["num_heads"], "n_heads")
    attention = section.section("attn_config", {})
    for key, value in (("alibi", True), ("alibi_bias_max", 8), ("prefix_lm", False)):
        attention.require(key, value, value, "the reference computes no other")
    if "logit_scale" in section:
        raise ConfigError(f"{section.where}.logit_scale: {show(section.values['logit_scale'])} is not supported, only null: the reference computes no other.")
    return {
        "name": "decoder", **size, "mlp_dim": 4 * size["width"], "norm": "layer_no_bias", "norm_eps": section.number("layer_norm_epsilon", 1e-5, 0.0, 1.0),
        "activation": "gelu", "gated": False, "biases": (), "positions": "alibi", "max_positions": common.positions_limit(section, "max_seq_len", 2048),
        "clip_qkv": attention.number("clip_qkv", None, least=0.0) or None, "attention_scale": attention.number("softmax_scale", None),
        "tied": section.flag("tie_word_embeddings", True),
    }


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a decoder.

    Raises:
      ConfigError: naming a setting that MPT does not have.
    """
    head_dim = model.width // model.num_heads
    common.refuse(model, "mpt", norm="layer_no_bias", norm_place="pre", parallel=False, final_norm=True, gated=False, activation="gelu",
                  mlp_dim=4 * model.width, biases=(), positions="alibi", qk_norm=None, attention_soft_cap=None, logits_soft_cap=None, window=[None, 0],
                  embed_dim=[None, model.width], embed_scale=[None, 1.0], num_kv_heads=[None, model.num_heads], head_dim=[None, head_dim])
    return {
        "model_type": "mpt", "architectures": ["MptForCausalLM"], "vocab_size": model.vocab_size, "d_model": model.width, "n_layers": model.depth,
        "n_heads": model.num_heads, "max_seq_len": model.max_positions, "layer_norm_epsilon": model.norm_eps, "tie_word_embeddings": model.tied,
        "expansion_ratio": 4, "no_bias": True, "learned_pos_emb": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "clip_qkv": model.clip_qkv or NULL,
                        "softmax_scale": NULL if model.attention_scale is None else model.attention_scale},
    }


def rows(model: Any) -> Rows:
    """The weight table."""
    heads, block = model.num_heads, "transformer.blocks.{i}."
    normed = ("query", "key") if model.qk_norm_whole else ()
    return [
        Row("transformer.wte.weight", "token_embedding"), Row("transformer.norm_f.weight", "norm/scale"),
        Row(block + "norm_1.weight", "blocks/norm_attention/scale"), Row(block + "norm_2.weight", "blocks/norm_mlp/scale"),
        Row(block + "attn.Wqkv.weight", tuple(f"blocks/attention/{part}/kernel" for part in common.ATTENTION), qkv(heads, model.width // heads)),
        Row(block + "attn.out_proj.weight", "blocks/attention/out/kernel", heads_in(heads)),
        Row(block + "ffn.up_proj.weight", "blocks/mlp/up/kernel", linear), Row(block + "ffn.down_proj.weight", "blocks/mlp/down/kernel", linear),
        *(Row(f"{block}attn.{name[0]}_ln.weight", f"blocks/attention/{name}_norm/scale") for name in normed),
        Tied("lm_head.weight", "transformer.wte.weight") if model.tied else Row("lm_head.weight", "head/kernel", linear),
    ]


FAMILY = Family(("mpt", "mosaic_gpt"), to_settings, to_config, rows, prefix="transformer.", renames=(
    (r"(^|\.)ln_([12f])\.", r"\1norm_\2."), (r"\.mlp\.mlp_(up|down)\.", r".ffn.\1_proj.")))
