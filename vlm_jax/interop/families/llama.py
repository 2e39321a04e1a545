"""Llama 1-3, Mistral, Qwen2 and Qwen3, Gemma 1-3 (text): one layout of names, differences as data.

What transformers does not compute, whatever config.json says, is not computed here either: attn_logit_softcapping of Gemma 3, layer_types of Mistral,
pretraining_tp of Llama, and partial_rotary_factor where the rotation is not stretched.
"""
from collections.abc import Mapping
import dataclasses
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_WIDTH, Section
from vlm_jax.interop.families import NULL, Family, language_config as common
from vlm_jax.interop.table import Ignored, Row, Rows, Tied
from vlm_jax.interop.transforms import heads_bias, heads_in, heads_out, linear


@dataclasses.dataclass(frozen=True)
class Kind:
    """One model_type.

    Attributes:
      architecture: the class of the reference.
      head_dim: the default; None is the width by the heads; kv_heads: the default, None is the heads.
      max_positions, activation, tied: defaults of config.json.
      activation_key: where it names the activation.
      bias: how it says which projections of attention have a bias: "attention_bias", or what the family always has.
      gemma: norms whose scale is stored minus one, embeddings times the root of the width.
      norm_place, qk_norm: of the decoder.
      windows: "none", "all" (every layer where sliding_window is given), "late" (from max_window_layers on, where use_sliding_window), or the length of a
        pattern whose last layer alone reads all.
      query_scalar: the default of query_pre_attn_scalar; None: the family has none.
    """
    architecture: str
    head_dim: int | None = None
    kv_heads: int | None = None
    max_positions: int = 2048
    activation: str = "silu"
    activation_key: str = "hidden_act"
    tied: bool = False
    bias: str | tuple[str, ...] = ()
    gemma: bool = False
    norm_place: str = "pre"
    qk_norm: str | None = None
    windows: str | int = "none"
    query_scalar: int | None = None


_GEMMA = Kind("GemmaForCausalLM", head_dim=256, kv_heads=16, max_positions=8192, activation="gelu_pytorch_tanh", tied=True, bias="attention_bias", gemma=True)
_GEMMA2 = dataclasses.replace(_GEMMA, architecture="Gemma2ForCausalLM", kv_heads=4, activation_key="hidden_activation", norm_place="both", windows=2,
                              query_scalar=256)
KINDS: dict[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", bias="attention_bias"),
    "mistral": Kind("MistralForCausalLM", kv_heads=8, max_positions=131_072, windows="all"),
    "qwen2": Kind("Qwen2ForCausalLM", kv_heads=32, max_positions=32_768, bias=common.ATTENTION, windows="late"),
    "qwen3": Kind("Qwen3ForCausalLM", head_dim=128, kv_heads=32, max_positions=32_768, bias="attention_bias", windows="late", qk_norm="rms"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": dataclasses.replace(_GEMMA2, architecture="Gemma3ForCausalLM", max_positions=131_072, windows=6, qk_norm="rms_plus_one"),
}


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Decoder`.

    Raises:
      ConfigError: naming a field that is missing, out of range, or says what is not computed here.
    """
    section = common.checked(config, tuple(KINDS))
    kind = KINDS[section.text("model_type")]
    size = common.sizes(section)
    max_positions = common.positions_limit(section, "max_position_embeddings", kind.max_positions)
    head_dim = kind.head_dim
    if head_dim is None and "head_dim" not in section:
        head_dim = common.dividing_heads(section, size["width"], size["num_heads"], "num_attention_heads")
    if kind.gemma:
        section.require("use_bidirectional_attention", False, False, "a decoder of this library reads what is before it")
    if kind.windows == "all" and len(set(section.texts("layer_types", [], among=(common.FULL, common.WINDOWED)))) > 1:
        raise ConfigError(f"{section.where}.layer_types names two kinds of layers, which mistral does not have; use another model_type.")
    settings = {
        "name": "decoder", **size, "mlp_dim": section.integer("intermediate_size", most=MAX_WIDTH * 16),
        "num_kv_heads": common.kv_heads(section, size["num_heads"], kind.kv_heads if "num_key_value_heads" not in section.values else None),
        "head_dim": section.integer("head_dim", head_dim, most=MAX_WIDTH), "max_positions": max_positions,
        "norm": "rms_plus_one" if kind.gemma else "rms", "norm_eps": section.number("rms_norm_eps", 1e-6, 0.0, 1.0), "norm_place": kind.norm_place,
        "activation": _activation(section, kind), "gated": True, "biases": _biases(section, kind), "qk_norm": kind.qk_norm,
        "tied": section.flag("tie_word_embeddings", kind.tied), "positions": "rope", **_windows(section, kind, size["depth"]),
    }
    settings["rope"] = _local_rope(section, max_positions) if kind.qk_norm == "rms_plus_one" else common.rope(section, max_positions=max_positions)
    if kind.gemma:
        settings["embed_scale"] = size["width"] ** 0.5
    if kind.query_scalar is not None:
        settings["attention_scale"] = section.integer("query_pre_attn_scalar", kind.query_scalar) ** -0.5
        settings["logits_soft_cap"] = common.nullable(section, "final_logit_softcapping", None if kind.qk_norm else 30.0, least=1e-6)
        if kind.qk_norm is None:
            settings["attention_soft_cap"] = common.nullable(section, "attn_logit_softcapping", 50.0, least=1e-6)
    return settings


def _activation(section: Section, kind: Kind) -> str:
    name = common.activation(section, kind.activation_key, kind.activation)
    # Releases of Gemma 1 say "gelu" and mean its tanh approximation, as the reference reads it; the exact one is "gelu_python".
    return "gelu_tanh" if kind.architecture == "GemmaForCausalLM" and name == "gelu" and section.text("hidden_act") == "gelu" else name


def _biases(section: Section, kind: Kind) -> tuple[str, ...]:
    if kind.bias != "attention_bias":
        return tuple(kind.bias)
    attention = (*common.ATTENTION, "out") if section.flag("attention_bias", False) else ()
    return attention + (("gate", "up", "down") if kind.architecture == "LlamaForCausalLM" and section.flag("mlp_bias", False) else ())


def _windows(section: Section, kind: Kind, depth: int) -> dict[str, Any]:
    if kind.windows == "none":
        return {}
    window = common.nullable(section, "sliding_window", 4096, "integer")
    if kind.windows == "all":
        return {"window": window, "windowed": (True,)}
    if kind.windows == "late":
        window = window if section.flag("use_sliding_window", False) else None
        first = section.integer("max_window_layers", 28, least=0)
        default = [common.FULL if window is None or layer < first else common.WINDOWED for layer in range(depth)]
        return common.windows(section, depth, window, default)
    period = section.integer("sliding_window_pattern", section.integer("_sliding_window_pattern", kind.windows)) if kind.windows == 6 else kind.windows
    return common.windows(section, depth, window, [common.WINDOWED if (layer + 1) % period else common.FULL for layer in range(depth)])


def _local_rope(section: Section, max_positions: int) -> dict[str, Any]:
    """Gemma 3 rotates windowed layers by another base, and says so in an object for each kind of layer (older: rope_theta, rope_local_base_freq)."""
    both = section.section("rope_parameters", {})
    whole, local = both.section(common.FULL, {}), both.section(common.WINDOWED, {})
    if "rope_scaling" in section:
        whole = Section({**whole.values, **section.section("rope_scaling").values}, f"{section.where}.rope_scaling")
    return {"theta": whole.number("rope_theta", section.number("rope_theta", 1_000_000.0, least=1e-3), least=1e-3),
            "scaling": common.scaling(whole, max_positions),
            "local_theta": local.number("rope_theta", section.number("rope_local_base_freq", 10_000.0, least=1e-3), least=1e-3),
            "local_scaling": common.scaling(local, max_positions)}


def model_type_of(model: Any) -> str:
    """Which model_type a decoder is written as.

    Raises:
      ConfigError: if none of this layout computes what it does.
    """
    common.refuse(model, "llama, mistral, qwen2, qwen3 or gemma", norm=["rms", "rms_plus_one"], positions="rope", gated=True, parallel=False, clip_qkv=None,
                  final_norm=True, embed_dim=None)
    if model.norm == "rms_plus_one":
        return "gemma" if model.norm_place == "pre" else "gemma3_text" if model.qk_norm else "gemma2"
    if model.qk_norm:
        return "qwen3"
    if set(model.biases) == set(common.ATTENTION):
        return "qwen2"
    return "mistral" if model.window and not model.biases else "llama"


def to_config(model: Any) -> dict[str, Any]:
    """config.json of a decoder.

    Raises:
      ConfigError: naming a setting that no model_type of this layout has.
    """
    model_type = model_type_of(model)
    kind = KINDS[model_type]
    head_dim = model.head_dim or model.width // model.num_heads
    common.refuse(model, model_type, qk_norm=kind.qk_norm, norm_place=kind.norm_place, embed_scale=[model.width ** 0.5] if kind.gemma else [None, 1.0])
    if kind.query_scalar is None:
        common.refuse(model, model_type, attention_scale=[None, head_dim ** -0.5], logits_soft_cap=None)
    if kind.query_scalar is None or kind.qk_norm:
        common.refuse(model, model_type, attention_soft_cap=None)
    attention, mlp = (*common.ATTENTION, "out"), ("gate", "up", "down")
    if kind.bias == "attention_bias":
        common.refuse(model, model_type, biases=[(), attention] + ([mlp, attention + mlp] if model_type == "llama" else []))
    else:
        common.refuse(model, model_type, biases=tuple(kind.bias))
    made = {
        "model_type": model_type, "architectures": [kind.architecture], "vocab_size": model.vocab_size, "hidden_size": model.width,
        "intermediate_size": model.mlp_dim, "num_hidden_layers": model.depth, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads, "head_dim": head_dim, "max_position_embeddings": model.max_positions,
        kind.activation_key: "gelu_python" if model_type == "gemma" and model.activation == "gelu" else common.activation_name(model.activation),
        "rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied,
    }
    if kind.bias == "attention_bias":
        made["attention_bias"] = "query" in model.biases
    if model_type == "llama":
        made["mlp_bias"] = "gate" in model.biases
    if kind.query_scalar is not None:
        made["query_pre_attn_scalar"] = _scalar(model.attention_scale, head_dim)
        made["final_logit_softcapping"] = model.logits_soft_cap or NULL
        made["attn_logit_softcapping"] = model.attention_soft_cap or NULL
    made |= _window_config(model, kind, model_type) | common.OLDER_ROPE
    if model_type == "gemma3_text":
        made["rope_parameters"] = {common.FULL: common.one_rope(model.rope["theta"], model.rope.get("scaling")),
                                   common.WINDOWED: common.one_rope(model.rope.get("local_theta") or model.rope["theta"], model.rope.get("local_scaling"))}
    else:
        made["rope_parameters"] = common.rope_parameters(model)
    return made


def _scalar(scale: float | None, head_dim: int) -> int:
    """query_pre_attn_scalar, a whole number in the reference.

    Raises:
      ConfigError: if the scale is not the inverse root of one.
    """
    scalar = head_dim if scale is None else round(scale ** -2)
    if scale is not None and abs(scalar ** -0.5 - scale) > 1e-9 * scale:
        raise ConfigError(f"attention_scale={scale} is not the inverse root of a whole number, as Gemma 2 and 3 write it; choose another.")
    return scalar


def _window_config(model: Any, kind: Kind, model_type: str) -> dict[str, Any]:
    types = common.layer_types(model)
    if kind.windows == "none":
        common.refuse(model, model_type, window=[None, 0])
        return {}
    if kind.windows == "all":
        if common.FULL in types:
            raise ConfigError("windowed: every layer of mistral has a window; export with windowed=(True,), or as qwen2, qwen3, gemma2 or gemma3.")
        return {"sliding_window": model.window or NULL}
    made = {"layer_types": types, "sliding_window": model.window or 4096}
    return made | ({"use_sliding_window": bool(model.window), "max_window_layers": model.depth} if kind.windows == "late" else {})


def rows(model: Any) -> Rows:
    """The weight table of a decoder of this layout."""
    heads, groups = model.num_heads, model.num_kv_heads or model.num_heads
    table: list[Row | Tied | Ignored] = [Row("model.embed_tokens.weight", "token_embedding"), Row("model.norm.weight", "norm/scale"),
                                         Ignored(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")]
    table += [Tied("lm_head.weight", "model.embed_tokens.weight")] if model.tied else [Row("lm_head.weight", "head/kernel", linear)]

    def layer(theirs: str, ours: str, *transform: Any) -> None:
        table.append(Row(f"model.layers.{{i}}.{theirs}", f"blocks/{ours}", *transform))

    for theirs, ours, count in (("q_proj", "query", heads), ("k_proj", "key", groups), ("v_proj", "value", groups)):
        layer(f"self_attn.{theirs}.weight", f"attention/{ours}/kernel", heads_out(count))
        if ours in model.biases:
            layer(f"self_attn.{theirs}.bias", f"attention/{ours}/bias", heads_bias(count))
    layer("self_attn.o_proj.weight", "attention/out/kernel", heads_in(heads))
    for ours in ("gate", "up", "down"):
        layer(f"mlp.{ours}_proj.weight", f"mlp/{ours}/kernel", linear)
        if ours in model.biases:
            layer(f"mlp.{ours}_proj.bias", f"mlp/{ours}/bias")
    if "out" in model.biases:
        layer("self_attn.o_proj.bias", "attention/out/bias")
    if model.qk_norm:
        layer("self_attn.q_norm.weight", "attention/query_norm/scale")
        layer("self_attn.k_norm.weight", "attention/key_norm/scale")
    layer("input_layernorm.weight", "norm_attention/scale")
    if model.norm_place == "both":
        layer("post_attention_layernorm.weight", "norm_attention_out/scale")
        layer("pre_feedforward_layernorm.weight", "norm_mlp/scale")
        layer("post_feedforward_layernorm.weight", "norm_mlp_out/scale")
    else:
        layer("post_attention_layernorm.weight", "norm_mlp/scale")
    return table


FAMILY = Family(tuple(KINDS), to_settings, to_config, rows, prefix="model.")
