"""Pix2StructForConditionalGeneration of transformers."""
from collections.abc import Mapping
import math
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_DEPTH, MAX_HEADS, MAX_LENGTH, MAX_VOCABULARY, MAX_WIDTH, Section
from vlm_jax.interop.families import Family
from vlm_jax.interop.families.language_config import activation, activation_name, refuse
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_in, heads_out, linear

CHANNELS = 3


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Pix2Struct`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = Section(config)
    section.text("model_type", among=("pix2struct",))
    text, vision = section.section("text_config", {}), section.section("vision_config", {})
    width = text.integer("hidden_size", 768, most=MAX_WIDTH)
    if vision.integer("hidden_size", 768, most=MAX_WIDTH) != width:
        raise ConfigError(f"{vision.where}.hidden_size is not {text.where}.hidden_size={width}, which the decoder reads; use config.json of one release.")
    pixels = vision.integer("patch_embed_hidden_size", 768, most=MAX_WIDTH * 16)
    patch = math.isqrt(pixels // CHANNELS)
    if patch * patch * CHANNELS != pixels:
        raise ConfigError(f"{vision.where}.patch_embed_hidden_size: {pixels} values are no square patch of {CHANNELS} channels; use config.json of one "
                          "release.")
    heads = text.integer("num_heads", 12, most=MAX_HEADS)
    if heads * text.integer("d_kv", 64, most=MAX_WIDTH) != width:
        raise ConfigError(f"{text.where}.d_kv: the heads of the decoder together are not hidden_size={width} wide, as the reference has them; use config.json "
                          "of one release.")
    decoder = {"mlp_dim": text.integer("d_ff", 2048, most=MAX_WIDTH * 16), "num_heads": heads, "head_dim": width // heads,
               "activation": activation(text, "dense_act_fn", "gelu_new"), "norm_eps": text.number("layer_norm_epsilon", 1e-6, 0.0, 1.0)}
    encoder = {"mlp_dim": vision.integer("d_ff", 2048, most=MAX_WIDTH * 16), "num_heads": vision.integer("num_attention_heads", 12, most=MAX_HEADS),
               "head_dim": vision.integer("d_kv", 64, most=MAX_WIDTH), "activation": activation(vision, "dense_act_fn", "gelu_new"),
               "norm_eps": vision.number("layer_norm_eps", 1e-6, 0.0, 1.0)}
    language = {"vocab_size": text.integer("vocab_size", 50_244, most=MAX_VOCABULARY), "width": width,
                "encoder_depth": vision.integer("num_hidden_layers", 12, most=MAX_DEPTH), "decoder_depth": text.integer("num_layers", 12, most=MAX_DEPTH),
                **decoder, "gated": True, "tied": section.flag("tie_word_embeddings", False), "start_id": text.integer("decoder_start_token_id", 0, least=0),
                "relative": {"buckets": text.integer("relative_attention_num_buckets", 32, most=MAX_LENGTH),
                             "max_distance": text.integer("relative_attention_max_distance", 128, most=MAX_LENGTH), "encoder": False}}
    return {"name": "pix2struct", "language": language, "encoder": {name: value for name, value in encoder.items() if value != decoder[name]},
            "image": {"patch_size": patch, "max_rows": vision.integer("seq_len", 4096, most=MAX_LENGTH)}}


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a `Pix2Struct`.

    Raises:
      ConfigError: naming a setting that the class does not have.
    """
    language, encoder = model.parts()
    relative = dict(language.relative)
    refuse(language, "pix2struct", norm="rms", attention_scale=1.0, gated=True, head_scale=None)
    if relative.get("encoder", True) or not relative.get("shared", True):
        raise ConfigError("model.language.relative: pix2struct has encoder=False and shared=True; export without other settings.")
    if language.num_heads * language.head_dim != language.width:
        raise ConfigError(f"model.language.head_dim: {language.num_heads} heads of {language.head_dim} are not {language.width} wide, as pix2struct has them.")
    image = model.image_settings()
    if image["channels"] != CHANNELS:
        raise ConfigError(f"model.image.channels={image['channels']}: pix2struct has {CHANNELS}.")
    text = {"model_type": "pix2struct_text_model", "vocab_size": language.vocab_size, "hidden_size": language.width, "d_kv": language.head_dim,
            "d_ff": language.mlp_dim, "num_layers": language.decoder_depth, "num_heads": language.num_heads,
            "relative_attention_num_buckets": relative.get("buckets", 32), "relative_attention_max_distance": relative.get("max_distance", 128),
            "layer_norm_epsilon": language.norm_eps, "dense_act_fn": activation_name(language.activation, "gelu_new"), "dropout_rate": language.dropout,
            "decoder_start_token_id": language.start_id, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": language.tied, "is_decoder": True}
    vision = {"model_type": "pix2struct_vision_model", "hidden_size": language.width, "patch_embed_hidden_size": image["patch_size"] ** 2 * CHANNELS,
              "d_ff": encoder["mlp_dim"], "d_kv": encoder["head_dim"], "num_hidden_layers": language.encoder_depth, "num_attention_heads": encoder["num_heads"],
              "dense_act_fn": activation_name(encoder["activation"], "gelu_new"), "layer_norm_eps": encoder["norm_eps"], "seq_len": image["max_rows"]}
    return {"model_type": "pix2struct", "architectures": ["Pix2StructForConditionalGeneration"], "is_encoder_decoder": True, "text_config": text,
            "vision_config": vision, "tie_word_embeddings": language.tied, "decoder_start_token_id": language.start_id, "pad_token_id": 0, "eos_token_id": 1}


def rows(model: Any) -> Rows:
    """The weight table."""
    language, encoder = model.parts()
    table: list[Row | Tied | Ignored] = [
        Row("encoder.embeddings.patch_projection.weight", "image/patch_embedding/kernel", linear),
        Row("encoder.embeddings.patch_projection.bias", "image/patch_embedding/bias"),
        Row("encoder.embeddings.row_embedder.weight", "image/row_embedding"), Row("encoder.embeddings.column_embedder.weight", "image/column_embedding"),
        Row("encoder.layernorm.weight", "language/encoder/norm/scale"), Row("decoder.final_layer_norm.weight", "language/decoder/norm/scale"),
        Row("decoder.embed_tokens.weight", "language/token_embedding"),
        Row("decoder.layer.0.self_attention.attention.relative_attention_bias.weight", "language/decoder/relative_bias"),
        Tied("decoder.lm_head.weight", "decoder.embed_tokens.weight") if language.tied else Row("decoder.lm_head.weight", "language/head/kernel", linear),
    ]

    def attention(theirs: str, ours: str, heads: int) -> None:
        for name in ("query", "key", "value"):
            table.append(Row(f"{theirs}.{name}.weight", f"{ours}/{name}/kernel", heads_out(heads)))
        table.append(Row(f"{theirs}.output.weight", f"{ours}/out/kernel", heads_in(heads)))

    def mlp(theirs: str, ours: str) -> None:
        table.extend(Row(f"{theirs}.{short}.weight", f"{ours}/{name}/kernel", linear) for short, name in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")))

    theirs, ours = "encoder.encoder.layer.{i}.", "language/encoder/blocks/"
    attention(f"{theirs}attention", f"{ours}attention", encoder["num_heads"])
    mlp(f"{theirs}mlp", f"{ours}mlp")
    table += [Row(f"{theirs}pre_{part}_layer_norm.weight", f"{ours}norm_{part}/scale") for part in ("attention", "mlp")]
    theirs, ours = "decoder.layer.{i}.", "language/decoder/blocks/"
    for part, name, norm in (("self_attention", "attention", "norm_attention"), ("encoder_decoder_attention", "cross_attention", "norm_cross")):
        attention(f"{theirs}{part}.attention", f"{ours}{name}", language.num_heads)
        table.append(Row(f"{theirs}{part}.layer_norm.weight", f"{ours}{norm}/scale"))
    mlp(f"{theirs}mlp.DenseReluDense", f"{ours}mlp")
    table.append(Row(f"{theirs}mlp.layer_norm.weight", f"{ours}norm_mlp/scale"))
    return table


FAMILY = Family(("pix2struct",), to_settings, to_config, rows)
