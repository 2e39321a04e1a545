"""OPT: learned positions that begin at row 2, norms before or (350M) after the sums, a token table of another width (350M). LayerNorm's eps is always 1e-5."""
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop.config_reader import MAX_WIDTH
from vlm_jax.interop.families import Family, language_config as common
from vlm_jax.interop.table import Row, Rows, Tied
from vlm_jax.interop.transforms import heads_bias, heads_in, heads_out, linear

BIASES = (*common.ATTENTION, "out", "up", "down")
NORMS = {True: "layer", False: "layer_plain"}   # by layer_norm_elementwise_affine


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Decoder`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, ("opt",))
    size = common.sizes(section)
    common.dividing_heads(section, size["width"], size["num_heads"], "num_attention_heads")
    before = section.flag("do_layer_norm_before", True)
    inner = section.integer("word_embed_proj_dim", size["width"], most=MAX_WIDTH)
    return {
        "name": "decoder", **size, "mlp_dim": section.integer("ffn_dim", most=MAX_WIDTH * 16),
        "norm": NORMS[section.flag("layer_norm_elementwise_affine", True)], "norm_eps": 1e-5,
        "norm_place": "pre" if before else "post", "final_norm": before and not section.flag("_remove_final_layer_norm", False),
        "activation": common.activation(section, "activation_function", "relu"), "gated": False,
        "biases": BIASES if section.flag("enable_bias", True) else (), "positions": "learned", "position_offset": 2,
        "max_positions": common.positions_limit(section, "max_position_embeddings", 2048), "embed_dim": None if inner == size["width"] else inner,
        "tied": section.flag("tie_word_embeddings", True),
    }


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a decoder.

    Raises:
      ConfigError: naming a setting that OPT does not have.
    """
    head_dim = model.width // model.num_heads
    common.refuse(model, "opt", norm=list(NORMS.values()), norm_eps=1e-5, norm_place=["pre", "post"], parallel=False, gated=False, biases=[BIASES, ()],
                  positions="learned", position_offset=2, qk_norm=None, attention_scale=[None, head_dim ** -0.5], attention_soft_cap=None, logits_soft_cap=None,
                  clip_qkv=None, window=[None, 0], embed_scale=[None, 1.0], num_kv_heads=[None, model.num_heads], head_dim=[None, head_dim])
    if model.norm_place == "post":
        common.refuse(model, "opt", final_norm=False)
    return {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": model.vocab_size, "hidden_size": model.width,
        "num_hidden_layers": model.depth, "num_attention_heads": model.num_heads, "ffn_dim": model.mlp_dim, "max_position_embeddings": model.max_positions,
        "do_layer_norm_before": model.norm_place == "pre", "_remove_final_layer_norm": model.norm_place == "pre" and not model.final_norm,
        "word_embed_proj_dim": model.embed_dim or model.width, "activation_function": common.activation_name(model.activation, "gelu_new"),
        "enable_bias": bool(model.biases), "layer_norm_elementwise_affine": model.norm == "layer", "tie_word_embeddings": model.tied,
    }


def rows(model: Any) -> Rows:
    """The weight table."""
    heads, block = model.num_heads, "model.decoder.layers.{i}."
    table = [Row("model.decoder.embed_tokens.weight", "token_embedding"), Row("model.decoder.embed_positions.weight", "position_embedding")]
    if model.embed_dim not in (None, model.width):
        table += [Row(f"model.decoder.{name}.weight", f"{name}/kernel", linear) for name in ("project_in", "project_out")]
    for theirs, ours, kernel, bias in (
            *((f"self_attn.{name[0]}_proj", f"attention/{name}", heads_out(heads), (heads_bias(heads),)) for name in common.ATTENTION),
            ("self_attn.out_proj", "attention/out", heads_in(heads), ()), ("fc1", "mlp/up", linear, ()), ("fc2", "mlp/down", linear, ())):
        table.append(Row(f"{block}{theirs}.weight", f"blocks/{ours}/kernel", kernel))
        if ours.rsplit("/")[-1] in model.biases:
            table.append(Row(f"{block}{theirs}.bias", f"blocks/{ours}/bias", *bias))
    if model.norm != "layer_plain":
        norms = [(block + "self_attn_layer_norm", "blocks/norm_attention"), (block + "final_layer_norm", "blocks/norm_mlp")]
        norms += [("model.decoder.final_layer_norm", "norm")] if model.final_norm else []
        table += [Row(f"{theirs}.{part}", f"{ours}/{name}") for theirs, ours in norms for part, name in (("weight", "scale"), ("bias", "bias"))]
    head = "model.decoder.embed_tokens.weight"
    return table + [Tied("lm_head.weight", head) if model.tied else Row("lm_head.weight", "head/kernel", linear)]


# Releases of the base class have no "model." before "decoder".
FAMILY = Family(("opt",), to_settings, to_config, rows, prefix="model.")
