"""BERT: encoder, pooler and the head for masked tokens. The head for next sentences, which releases of Google carry, is left out."""
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.interop.config_reader import MAX_WIDTH
from vlm_jax.interop.families import Family, language_config as common
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_bias, heads_in, heads_out, linear

# class of the reference -> (pooler, head for masked tokens)
PARTS = {"BertModel": (True, False), "BertForMaskedLM": (False, True), "BertForPreTraining": (True, True)}


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Bert`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, ("bert",))
    size = common.sizes(section)
    common.dividing_heads(section, size["width"], size["num_heads"], "num_attention_heads")
    section.require("position_embedding_type", "absolute", "absolute", "the reference computes no other")
    for key in ("is_decoder", "add_cross_attention"):
        section.require(key, False, False, "BERT reads both ways here, and one text")
    section.require("tie_word_embeddings", True, True, "the head of BERT is its token table here")
    pooler, mlm_head = PARTS.get(section.architecture(), PARTS["BertModel"])
    return {
        "name": "bert", **size, "mlp_dim": section.integer("intermediate_size", most=MAX_WIDTH * 16),
        "type_vocab_size": section.integer("type_vocab_size", 2), "max_positions": common.positions_limit(section, "max_position_embeddings", 512),
        "norm_eps": section.number("layer_norm_eps", 1e-12, 0.0, 1.0), "activation": common.activation(section, "hidden_act", "gelu"), "pooler": pooler,
        "mlm_head": mlm_head,
    }


def by_tensors(settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The settings, with the parts that the tensors have."""
    return {**settings, "pooler": any(name.endswith("pooler.dense.weight") for name in names),
            "mlm_head": "cls.predictions.transform.dense.weight" in names}


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a `Bert`."""
    architecture = next((name for name, parts in PARTS.items() if parts == (model.pooler, model.mlm_head)), "BertModel")
    return {
        "model_type": "bert", "architectures": [architecture], "vocab_size": model.vocab_size, "hidden_size": model.width, "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads, "intermediate_size": model.mlp_dim, "type_vocab_size": model.type_vocab_size,
        "max_position_embeddings": model.max_positions, "layer_norm_eps": model.norm_eps, "hidden_act": common.activation_name(model.activation, "gelu_new"),
    }


def rows(model: Any) -> Rows:
    """The weight table."""
    heads, layer = model.num_heads, "bert.encoder.layer.{i}."
    table = [Row(f"bert.embeddings.{theirs}_embeddings.weight", f"{ours}_embedding")
             for theirs, ours in (("word", "token"), ("position", "position"), ("token_type", "type"))]
    linears = [(f"{layer}attention.self.{name}", f"blocks/attention/{name}", heads_out(heads), (heads_bias(heads),)) for name in common.ATTENTION]
    linears += [(f"{layer}attention.output.dense", "blocks/attention/out", heads_in(heads), ()), (f"{layer}intermediate.dense", "blocks/mlp/up", linear, ()),
                (f"{layer}output.dense", "blocks/mlp/down", linear, ())]
    norms = [("bert.embeddings.LayerNorm", "norm_embedding"), (f"{layer}attention.output.LayerNorm", "blocks/norm_attention"),
             (f"{layer}output.LayerNorm", "blocks/norm_mlp")]
    if model.pooler:
        linears.append(("bert.pooler.dense", "pooler", linear, ()))
    if model.mlm_head:
        linears.append(("cls.predictions.transform.dense", "mlm_dense", linear, ()))
        norms.append(("cls.predictions.transform.LayerNorm", "mlm_norm"))
        table += [Row("cls.predictions.bias", "head/bias"), Tied("cls.predictions.decoder.bias", "cls.predictions.bias"),
                  Tied("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")]
    for theirs, ours, kernel, bias in linears:
        table += [Row(f"{theirs}.weight", f"{ours}/kernel", kernel), Row(f"{theirs}.bias", f"{ours}/bias", *bias)]
    table += [Row(f"{theirs}.{part}", f"{ours}/{name}") for theirs, ours in norms for part, name in (("weight", "scale"), ("bias", "bias"))]
    return [*table, Ignored(r"bert\.embeddings\.(position|token_type)_ids"), Ignored(r"cls\.seq_relationship\.(weight|bias)")]


FAMILY = Family(("bert",), to_settings, to_config, rows, by_tensors, prefix="bert.",
                renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")))
