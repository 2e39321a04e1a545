"""T5, T5 1.1, FLAN-T5, mT5 and UMT5.

Whether the head is the token table is said by the tensors: releases of T5 1.1 and later have a head of their own, while transformers 5 writes
tie_word_embeddings=true for all of them, so `by_tensors` looks for one. What the head reads is divided by the root of the width in T5 1.0
(scale_decoder_outputs, or tie_word_embeddings that is not false) and in UMT5 unless tie_word_embeddings is false, in mT5 never, as the reference computes it.
"""
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_DEPTH, MAX_HEADS, MAX_VOCABULARY, MAX_WIDTH, Section
from vlm_jax.interop.families import Family, language_config as common
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_in, heads_out, linear

GATED = {"t5": "relu", "mt5": "gated-gelu", "umt5": "gated-gelu"}   # the default of feed_forward_proj
ARCHITECTURES = {"t5": "T5ForConditionalGeneration", "umt5": "UMT5ForConditionalGeneration"}


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `EncoderDecoder`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, tuple(GATED))
    model_type = section.text("model_type")
    section.require("is_encoder_decoder", True, True, "the encoder alone is not a model here")
    section.require("is_decoder", False, False, "the decoder alone is not a model here")
    activation, gated = _feed_forward(section, GATED[model_type])
    width, depth = section.integer("d_model", most=MAX_WIDTH), section.integer("num_layers", most=MAX_DEPTH)
    buckets, distance = section.integer("relative_attention_num_buckets", 32, least=4), section.integer("relative_attention_max_distance", 128)
    if distance <= buckets // 2:
        raise ConfigError(f"{section.where}.relative_attention_max_distance: {distance} is not above half of relative_attention_num_buckets={buckets}; use "
                          "config.json of one release.")
    tied = section.flag("tie_word_embeddings", True)
    scaled = {"t5": section.flag("scale_decoder_outputs", tied), "mt5": False, "umt5": tied}[model_type]
    return {
        "name": "encoder_decoder", "vocab_size": section.integer("vocab_size", most=MAX_VOCABULARY), "width": width, "encoder_depth": depth,
        "decoder_depth": section.integer("num_decoder_layers", depth, most=MAX_DEPTH), "mlp_dim": section.integer("d_ff", most=MAX_WIDTH * 16),
        "num_heads": section.integer("num_heads", most=MAX_HEADS), "head_dim": section.integer("d_kv", most=MAX_WIDTH), "norm": "rms",
        "norm_eps": section.number("layer_norm_epsilon", 1e-6, 0.0, 1.0), "activation": activation, "gated": gated,
        "relative": {"buckets": buckets, "max_distance": distance, "shared": model_type != "umt5"}, "attention_scale": 1.0, "tied": tied,
        "head_scale": width ** -0.5 if scaled else None, "start_id": _start(section),
    }


def _feed_forward(section: Section, default: str) -> tuple[str, bool]:
    """(our name of the activation, whether it is gated) from "gelu", "gated-gelu" and the like, and the two fields that transformers writes beside it."""
    said = section.text("feed_forward_proj", default)
    first, _, name = said.rpartition("-")
    if first not in ("", "gated") or name not in common.ACTIVATIONS:
        raise ConfigError(f'{section.where}.feed_forward_proj: "{said}" is not supported; it must be an activation, or "gated-" and one: '
                          f"{', '.join(sorted(common.ACTIVATIONS))}.")
    name = "gelu_new" if said == "gated-gelu" else name
    return common.activation(section, "dense_act_fn", name), section.flag("is_gated_act", bool(first))


def _start(section: Section) -> int:
    for key in ("decoder_start_token_id", "pad_token_id"):
        if key in section:
            return section.integer(key, least=0, most=MAX_VOCABULARY)
    return 0


def by_tensors(settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The settings, with the head tied unless there is one among the names of the tensors."""
    return {**settings, "tied": "lm_head.weight" not in names}


def to_config(model: Any) -> dict[str, Any]:
    """config.json of an encoder-decoder, as T5, or UMT5 where every layer has its own relative positions.

    Raises:
      ConfigError: naming a setting that neither has.
    """
    relative = dict(model.relative)
    model_type = "t5" if relative.get("shared", True) else "umt5"
    common.refuse(model, model_type, norm="rms", attention_scale=1.0, head_scale=[None, model.width ** -0.5])
    if not relative.get("encoder", True):
        raise ConfigError(f"relative.encoder=False: the encoder of {model_type} has relative positions; only Pix2Struct's has none.")
    activation = common.activation_name(model.activation, "gelu_new")
    # transformers reads "gated-gelu" as the tanh approximation, and dense_act_fn where it is there.
    named = "gelu" if model.gated and activation == "gelu_new" else activation
    made = {
        "model_type": model_type, "architectures": [ARCHITECTURES[model_type]], "is_encoder_decoder": True, "vocab_size": model.vocab_size,
        "d_model": model.width, "d_kv": model.head_dim, "d_ff": model.mlp_dim, "num_layers": model.encoder_depth, "num_decoder_layers": model.decoder_depth,
        "num_heads": model.num_heads, "relative_attention_num_buckets": relative.get("buckets", 32),
        "relative_attention_max_distance": relative.get("max_distance", 128), "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": ("gated-" if model.gated else "") + named, "dense_act_fn": activation, "is_gated_act": model.gated,
        "decoder_start_token_id": model.start_id, "pad_token_id": 0, "tie_word_embeddings": model.tied,
    }
    if model_type == "t5":
        return made | {"scale_decoder_outputs": model.head_scale is not None}
    return made | {"tie_word_embeddings": model.head_scale is not None}


def rows(model: Any) -> Rows:
    """The weight table."""
    heads = model.num_heads
    every = "{i}" if not dict(model.relative).get("shared", True) else "0"
    table: list[Row | Tied | Ignored] = [Row("shared.weight", "token_embedding")]
    table += [Tied(f"{stack}.embed_tokens.weight", "shared.weight") for stack in ("encoder", "decoder")]
    table.append(Ignored(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"))   # never read by the reference
    table.append(Tied("lm_head.weight", "shared.weight") if model.tied else Row("lm_head.weight", "head/kernel", linear))
    for stack in ("encoder", "decoder"):
        block, ours = f"{stack}.block.{{i}}.layer.", f"{stack}/blocks/"
        table += [Row(f"{stack}.final_layer_norm.weight", f"{stack}/norm/scale"),
                  Row(f"{stack}.block.{every}.layer.0.SelfAttention.relative_attention_bias.weight", f"{stack}/relative_bias")]
        parts = [("0.SelfAttention", "attention", "0", "norm_attention")]
        parts += [("1.EncDecAttention", "cross_attention", "1", "norm_cross")] if stack == "decoder" else []
        for theirs, attention, number, norm in parts:
            table += [Row(f"{block}{theirs}.{short}.weight", f"{ours}{attention}/{name}/kernel", heads_in(heads) if short == "o" else heads_out(heads))
                      for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))]
            table.append(Row(f"{block}{number}.layer_norm.weight", f"{ours}{norm}/scale"))
        last = f"{block}{len(parts)}."
        table += [Row(f"{last}layer_norm.weight", f"{ours}norm_mlp/scale"), Row(f"{last}DenseReluDense.wo.weight", f"{ours}mlp/down/kernel", linear)]
        kernels = (("wi_0", "gate"), ("wi_1", "up")) if model.gated else (("wi", "up"),)
        table += [Row(f"{last}DenseReluDense.{theirs}.weight", f"{ours}mlp/{name}/kernel", linear) for theirs, name in kernels]
    return table


FAMILY = Family(tuple(GATED), to_settings, to_config, rows, by_tensors)
