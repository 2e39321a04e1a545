"""GPT-2: learned positions, fused queries, keys and values, kernels stored [in, out]. reorder_and_upcast_attn changes roundings only and is not needed here."""
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.config_reader import MAX_WIDTH
from vlm_jax.interop.families import Family, language_config as common
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_in_plain, linear, qkv_bias, qkv_plain

BIASES = (*common.ATTENTION, "out", "up", "down")


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Decoder`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, ("gpt2",))
    size = common.sizes(section, {"width": "n_embd", "depth": "n_layer", "num_heads": "n_head"})
    head_dim = common.dividing_heads(section, size["width"], size["num_heads"], "n_head")
    section.require("add_cross_attention", False, False, "a decoder of this library reads no second sequence")
    scale = head_dim ** -0.5 if section.flag("scale_attn_weights", True) else 1.0
    if section.flag("scale_attn_by_inverse_layer_idx", False):
        scale = tuple(scale / (layer + 1) for layer in range(size["depth"]))
    return {
        "name": "decoder", **size, "mlp_dim": section.integer("n_inner", 4 * size["width"], most=MAX_WIDTH * 16), "norm": "layer",
        "norm_eps": section.number("layer_norm_epsilon", 1e-5, 0.0, 1.0), "activation": common.activation(section, "activation_function", "gelu_new"),
        "gated": False, "biases": BIASES, "positions": "learned", "max_positions": common.positions_limit(section, "n_positions", 1024),
        "attention_scale": scale, "tied": section.flag("tie_word_embeddings", True),
    }


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a decoder.

    Raises:
      ConfigError: naming a setting that GPT-2 does not have.
    """
    scale = (model.width // model.num_heads) ** -0.5
    falling = [tuple(first / (layer + 1) for layer in range(model.depth)) for first in (scale, 1.0)]
    common.refuse(model, "gpt2", norm="layer", norm_place="pre", parallel=False, final_norm=True, gated=False, biases=BIASES, positions="learned",
                  position_offset=0, qk_norm=None, attention_soft_cap=None, logits_soft_cap=None, clip_qkv=None, window=[None, 0],
                  embed_dim=[None, model.width], embed_scale=[None, 1.0], num_kv_heads=[None, model.num_heads], head_dim=[None, model.width // model.num_heads],
                  attention_scale=[None, scale, 1.0, *falling])
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": model.vocab_size, "n_embd": model.width, "n_layer": model.depth,
        "n_head": model.num_heads, "n_inner": model.mlp_dim, "n_positions": model.max_positions, "layer_norm_epsilon": model.norm_eps,
        "activation_function": common.activation_name(model.activation, "gelu_new"), "tie_word_embeddings": model.tied,
        "scale_attn_weights": model.attention_scale not in (1.0, falling[1]), "scale_attn_by_inverse_layer_idx": model.attention_scale in falling,
    }


def rows(model: Any) -> Rows:
    """The weight table."""
    heads, head_dim = model.num_heads, model.width // model.num_heads
    block, ours = "transformer.h.{i}.", "blocks/"
    fused = tuple(f"{ours}attention/{part}/" for part in common.ATTENTION)
    table = [
        Row("transformer.wte.weight", "token_embedding"), Row("transformer.wpe.weight", "position_embedding"),
        Row(block + "attn.c_attn.weight", tuple(part + "kernel" for part in fused), qkv_plain(heads, head_dim)),
        Row(block + "attn.c_attn.bias", tuple(part + "bias" for part in fused), qkv_bias(heads, head_dim)),
        Row(block + "attn.c_proj.weight", ours + "attention/out/kernel", heads_in_plain(heads)), Row(block + "attn.c_proj.bias", ours + "attention/out/bias"),
        Row(block + "mlp.c_fc.weight", ours + "mlp/up/kernel"), Row(block + "mlp.c_fc.bias", ours + "mlp/up/bias"),
        Row(block + "mlp.c_proj.weight", ours + "mlp/down/kernel"), Row(block + "mlp.c_proj.bias", ours + "mlp/down/bias"),
    ]
    for theirs, norm in ((block + "ln_1", ours + "norm_attention"), (block + "ln_2", ours + "norm_mlp"), ("transformer.ln_f", "norm")):
        table += [Row(theirs + ".weight", norm + "/scale"), Row(theirs + ".bias", norm + "/bias")]
    table.append(Ignored(r"transformer\.h\.\d+\.attn\.(masked_)?bias"))
    return table + [Tied("lm_head.weight", "transformer.wte.weight") if model.tied else Row("lm_head.weight", "head/kernel", linear)]


FAMILY = Family(("gpt2",), to_settings, to_config, rows, prefix="transformer.")
