"""GPT-NeoX and Pythia: attention and MLP side by side, rotary positions on a part of each head, query, key and value of a head stored together."""
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.config_reader import MAX_WIDTH
from vlm_jax.interop.families import Family, language_config as common
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_in, linear, qkv_interleaved, qkv_interleaved_bias

MLP_BIASES = ("up", "down")
BIASES = (*common.ATTENTION, "out", *MLP_BIASES)


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Decoder`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, ("gpt_neox",))
    size = common.sizes(section)
    common.dividing_heads(section, size["width"], size["num_heads"], "num_attention_heads")
    max_positions = common.positions_limit(section, "max_position_embeddings", 2048)
    return {
        "name": "decoder", **size, "mlp_dim": section.integer("intermediate_size", most=MAX_WIDTH * 16), "norm": "layer",
        "norm_eps": section.number("layer_norm_eps", 1e-5, 0.0, 1.0), "parallel": section.flag("use_parallel_residual", True),
        "activation": common.activation(section, "hidden_act", "gelu"), "gated": False,
        "biases": BIASES if section.flag("attention_bias", True) else MLP_BIASES, "positions": "rope", "max_positions": max_positions,
        "rope": common.rope(section, max_positions=max_positions, theta_key="rotary_emb_base", fraction=0.25, fraction_key="rotary_pct"),
        "tied": section.flag("tie_word_embeddings", False),
    }


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a decoder.

    Raises:
      ConfigError: naming a setting that GPT-NeoX does not have.
    """
    head_dim = model.width // model.num_heads
    common.refuse(model, "gpt_neox", norm="layer", norm_place="pre", shared_norm=False, final_norm=True, gated=False, biases=[BIASES, MLP_BIASES],
                  positions="rope", qk_norm=None, attention_scale=[None, head_dim ** -0.5], attention_soft_cap=None, logits_soft_cap=None, clip_qkv=None,
                  window=[None, 0], embed_dim=[None, model.width], embed_scale=[None, 1.0], num_kv_heads=[None, model.num_heads], head_dim=[None, head_dim])
    return {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": model.vocab_size, "hidden_size": model.width,
        "num_hidden_layers": model.depth, "num_attention_heads": model.num_heads, "intermediate_size": model.mlp_dim,
        "max_position_embeddings": model.max_positions, "layer_norm_eps": model.norm_eps, "use_parallel_residual": model.parallel,
        "hidden_act": common.activation_name(model.activation), "attention_bias": "query" in model.biases, "tie_word_embeddings": model.tied,
        "rope_parameters": common.rope_parameters(model, fraction=True), **common.OLDER_ROPE,
    }


def rows(model: Any) -> Rows:
    """The weight table."""
    heads, block = model.num_heads, "gpt_neox.layers.{i}."
    fused = tuple(f"blocks/attention/{part}/" for part in common.ATTENTION)
    table = [
        Row("gpt_neox.embed_in.weight", "token_embedding"),
        Row(block + "attention.query_key_value.weight", tuple(part + "kernel" for part in fused), qkv_interleaved(heads)),
        Row(block + "attention.dense.weight", "blocks/attention/out/kernel", heads_in(heads)),
        Row(block + "mlp.dense_h_to_4h.weight", "blocks/mlp/up/kernel", linear), Row(block + "mlp.dense_h_to_4h.bias", "blocks/mlp/up/bias"),
        Row(block + "mlp.dense_4h_to_h.weight", "blocks/mlp/down/kernel", linear), Row(block + "mlp.dense_4h_to_h.bias", "blocks/mlp/down/bias"),
    ]
    if "query" in model.biases:
        table += [Row(block + "attention.query_key_value.bias", tuple(part + "bias" for part in fused), qkv_interleaved_bias(heads)),
                  Row(block + "attention.dense.bias", "blocks/attention/out/bias")]
    for theirs, ours in ((block + "input_layernorm", "blocks/norm_attention"), (block + "post_attention_layernorm", "blocks/norm_mlp"),
                         ("gpt_neox.final_layer_norm", "norm")):
        table += [Row(theirs + ".weight", ours + "/scale"), Row(theirs + ".bias", ours + "/bias")]
    table.append(Ignored(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"))
    return table + [Tied("embed_out.weight", "gpt_neox.embed_in.weight") if model.tied else Row("embed_out.weight", "head/kernel", linear)]


FAMILY = Family(("gpt_neox",), to_settings, to_config, rows, prefix="gpt_neox.", renames=((r"^lm_head\.weight$", "embed_out.weight"),))
