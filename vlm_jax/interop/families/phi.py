"""Phi-1 to Phi-2: attention and MLP side by side after one norm, rotary positions on a part of each head, a bias everywhere, also of the head."""
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.config_reader import MAX_WIDTH
from vlm_jax.interop.families import Family, language_config as common
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_bias, heads_in, heads_out, linear

BIASES = (*common.ATTENTION, "out", "up", "down", "head")


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Decoder`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, ("phi",))
    size = common.sizes(section)
    head_dim = common.dividing_heads(section, size["width"], size["num_heads"], "num_attention_heads")
    section.require("head_dim", head_dim, head_dim, "heads of Phi share the width")
    max_positions = common.positions_limit(section, "max_position_embeddings", 2048)
    return {
        "name": "decoder", **size, "num_kv_heads": common.kv_heads(section, size["num_heads"]),
        "mlp_dim": section.integer("intermediate_size", most=MAX_WIDTH * 16), "norm": "layer", "norm_eps": section.number("layer_norm_eps", 1e-5, 0.0, 1.0),
        "parallel": True, "shared_norm": True, "activation": common.activation(section, "hidden_act", "gelu_new"), "gated": False, "biases": BIASES,
        "positions": "rope", "max_positions": max_positions, "rope": common.rope(section, max_positions=max_positions, fraction=0.5),
        "qk_norm": "layer" if section.flag("qk_layernorm", False) else None, "tied": section.flag("tie_word_embeddings", False),
    }


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a decoder.

    Raises:
      ConfigError: naming a setting that Phi does not have.
    """
    head_dim = model.width // model.num_heads
    common.refuse(model, "phi", norm="layer", norm_place="pre", parallel=True, shared_norm=True, final_norm=True, gated=False, biases=BIASES, positions="rope",
                  qk_norm=[None, "layer"], attention_scale=[None, head_dim ** -0.5], attention_soft_cap=None, logits_soft_cap=None, clip_qkv=None,
                  window=[None, 0], embed_dim=[None, model.width], embed_scale=[None, 1.0], head_dim=[None, head_dim])
    return {
        "model_type": "phi", "architectures": ["PhiForCausalLM"], "vocab_size": model.vocab_size, "hidden_size": model.width,
        "num_hidden_layers": model.depth, "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "intermediate_size": model.mlp_dim, "max_position_embeddings": model.max_positions, "layer_norm_eps": model.norm_eps,
        "hidden_act": common.activation_name(model.activation, "gelu_new"), "qk_layernorm": model.qk_norm is not None, "tie_word_embeddings": model.tied,
        "rope_parameters": common.rope_parameters(model, fraction=True), **common.OLDER_ROPE,
    }


def rows(model: Any) -> Rows:
    """The weight table."""
    heads, groups, block = model.num_heads, model.num_kv_heads or model.num_heads, "model.layers.{i}."
    table = [Row("model.embed_tokens.weight", "token_embedding"), Row("lm_head.bias", "head/bias")]
    for theirs, ours, kernel, bias in (
            ("self_attn.q_proj", "attention/query", heads_out(heads), (heads_bias(heads),)),
            ("self_attn.k_proj", "attention/key", heads_out(groups), (heads_bias(groups),)),
            ("self_attn.v_proj", "attention/value", heads_out(groups), (heads_bias(groups),)),
            ("self_attn.dense", "attention/out", heads_in(heads), ()), ("mlp.fc1", "mlp/up", linear, ()), ("mlp.fc2", "mlp/down", linear, ())):
        table += [Row(f"{block}{theirs}.weight", f"blocks/{ours}/kernel", kernel), Row(f"{block}{theirs}.bias", f"blocks/{ours}/bias", *bias)]
    norms = [(block + "input_layernorm", "blocks/norm_attention"), ("model.final_layernorm", "norm")]
    if model.qk_norm:
        norms += [(block + "self_attn.q_layernorm", "blocks/attention/query_norm"), (block + "self_attn.k_layernorm", "blocks/attention/key_norm")]
    table += [Row(f"{theirs}.{part}", f"{ours}/{name}") for theirs, ours in norms for part, name in (("weight", "scale"), ("bias", "bias"))]
    table.append(Ignored(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"))
    return table + [Tied("lm_head.weight", "model.embed_tokens.weight") if model.tied else Row("lm_head.weight", "head/kernel", linear)]


FAMILY = Family(("phi",), to_settings, to_config, rows, prefix="model.")
