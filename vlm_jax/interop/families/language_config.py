"""What config.json of language models share: activations, rotary positions, windows, and the refusal of what would compute something else."""
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_DEPTH, MAX_HEADS, MAX_LENGTH, MAX_VOCABULARY, MAX_WIDTH, Section
from vlm_jax.interop.safetensors import show

# Their name of an activation -> ours. Several of theirs are one function: the tanh approximation of GELU in different roundings.
ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "squared_relu", "relu6": "relu6", "leaky_relu": "leaky_relu",
    "silu": "silu", "swish": "silu", "mish": "mish", "hardswish": "hard_swish", "tanh": "tanh", "sigmoid": "sigmoid", "linear": "linear",
}
_THEIRS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
ATTENTION, FULL, WINDOWED = ("query", "key", "value"), "full_attention", "sliding_attention"


def checked(config: Mapping[str, Any], model_types: Sequence[str]) -> Section:
    """The config as a `Section`, after refusing what no language model of this library computes.

    Raises:
      ConfigError: for another `model_type`, quantised weights, attention that is not causal where the family's is, or settings of single layers.
    """
    section = Section(config)
    section.text("model_type", among=model_types)
    section.require("is_causal", True, True, "a decoder of this library reads what is before it")
    for key, remedy in (("quantization_config", "fetch the weights in bfloat16"), ("per_layer_config", "every layer has the same sizes here")):
        if key in section:
            raise ConfigError(f"{section.where}.{key}: {show(section.values[key])} is not supported; {remedy}.")
    return section


def activation(section: Section, key: str, default: str) -> str:
    """Our name of the activation that `key` names."""
    return ACTIVATIONS[section.text(key, default, among=ACTIVATIONS)]


def activation_name(name: str, gelu_tanh: str = "gelu_pytorch_tanh") -> str:
    """Their name of an activation of ours; `gelu_tanh`: how the family calls that one.

    Raises:
      ConfigError: for one that they do not have.
    """
    if name not in _THEIRS:
        raise ConfigError(f'activation "{name}" has no name in config.json; supported: {", ".join(sorted(_THEIRS))}.')
    return gelu_tanh if name == "gelu_tanh" else _THEIRS[name]


def sizes(section: Section, names: Mapping[str, str] | None = None) -> dict[str, int]:
    """vocab_size, width, depth and num_heads; `names` are their names where the family has its own."""
    names = {"vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"} | dict(names or {})
    limits = {"vocab_size": MAX_VOCABULARY, "width": MAX_WIDTH, "depth": MAX_DEPTH, "num_heads": MAX_HEADS}
    return {ours: section.integer(theirs, most=limits[ours]) for ours, theirs in names.items()}


def dividing_heads(section: Section, width: int, heads: int, key: str) -> int:
    """The width of a head, where the family has no setting for it.

    Raises:
      ConfigError: if the heads do not divide the width.
    """
    if width % heads:
        raise ConfigError(f"{section.where}.{key}: {heads} heads do not divide the width {width}; use config.json and weights of one release.")
    return width // heads


def kv_heads(section: Section, heads: int, default: int | None = None) -> int:
    """The number of heads of keys and values.

    Raises:
      ConfigError: if it does not divide the number of heads.
    """
    groups = section.integer("num_key_value_heads", heads if default is None else default, most=MAX_HEADS)
    if heads % groups:
        raise ConfigError(f"{section.where}.num_key_value_heads: {groups} does not divide num_attention_heads={heads}; use config.json and weights of one "
                          "release.")
    return groups


def nullable(section: Section, key: str, default: Any, kind: str = "number", **limits: Any) -> Any:
    """A value for which null means None, not the default, which a missing key means."""
    if section.values.get(key, default) is None:
        return None
    return getattr(section, kind)(key, default, **limits)


def windows(section: Section, depth: int, window: int | None, default: Sequence[str]) -> dict[str, Any]:
    """The settings `window` and `windowed` of layer_types, the pattern as short as it can be.

    Raises:
      ConfigError: if layer_types has another length than the depth, or names windowed layers where no window is given.
    """
    types = section.texts("layer_types", list(default), among=(FULL, WINDOWED))
    if len(types) != depth:
        raise ConfigError(f"{section.where}.layer_types has {len(types)} entries for {depth} layers; use config.json of one release.")
    windowed = tuple(kind == WINDOWED for kind in types)
    if not any(windowed):
        return {"window": None, "windowed": (True,)}
    if window is None:
        raise ConfigError(f'{section.where}.sliding_window is missing, which the layers of type "{WINDOWED}" need; give its number of positions.')
    period = next(n for n in range(1, depth + 1) if all(windowed[i] == windowed[i % n] for i in range(depth)))
    return {"window": window, "windowed": windowed[:period]}


def layer_types(model: Any) -> list[str]:
    """layer_types of a decoder."""
    windowed = model.windowed if model.window else (False,)
    return [WINDOWED if windowed[layer % len(windowed)] else FULL for layer in range(model.depth)]


def rope(section: Section, *, max_positions: int, theta: float = 10_000.0, theta_key: str = "rope_theta", fraction: float | None = None,
         fraction_key: str = "partial_rotary_factor") -> dict[str, Any]:
    """The setting `rope` of a decoder whose layers all rotate alike, from `rope_parameters`, or the older `rope_scaling` and `rope_theta`.

    Args:
      theta, fraction: the family's defaults; without a fraction the family rotates whole heads, whatever the config says.
    """
    key = "rope_scaling" if section.values.get("rope_scaling") else "rope_parameters"
    given = section.section(key, {})
    made = {"theta": given.number("rope_theta", section.number(theta_key, theta, least=1e-3), least=1e-3)}
    if fraction is not None:
        made["fraction"] = given.number("partial_rotary_factor", section.number(fraction_key, fraction, 1e-3, 1.0), 1e-3, 1.0)
    made["scaling"] = scaling(given, max_positions, section.integer("original_max_position_embeddings", None))
    if fraction is None and made["scaling"] is not None:
        given.require("partial_rotary_factor", 1.0, 1.0, "this family rotates whole heads")
    return made


def scaling(given: Section, max_positions: int, original: int | None = None) -> dict[str, Any] | None:
    """The setting `rope.scaling` of one object of rope parameters.

    Args:
      max_positions: max_position_embeddings, for which the kinds were trained that do not say so themselves.
      original: original_max_position_embeddings beside the object, which comes before what is inside.
    """
    kind = given.text("rope_type", given.text("type", "default"), among=("default", "linear", "dynamic", "llama3", "yarn", "longrope"))
    if kind == "default":
        return None
    made: dict[str, Any] = {"kind": kind}
    if kind in ("linear", "dynamic", "llama3"):
        made["factor"] = given.number("factor", least=1e-3)
    if kind == "linear":
        return made
    if kind == "dynamic":
        return made | {"max_position_embeddings": max_positions}
    trained = made["original_max_position_embeddings"] = original or given.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = given.number("low_freq_factor", least=1e-3), given.number("high_freq_factor", least=1e-3)
        if high <= low:
            raise ConfigError(f"{given.where}.high_freq_factor: {high} is not above low_freq_factor={low}; use config.json of one release.")
        return made | {"low_freq_factor": low, "high_freq_factor": high}
    made["factor"] = given.number("factor", max_positions / trained, least=1e-3)
    optional = {"attention_factor": given.number("attention_factor", None, least=0.0)}
    if kind == "longrope":
        made |= {key: tuple(given.numbers(key)) for key in ("short_factor", "long_factor")}
    else:
        optional |= {key: given.number(key, None, least=0.0) for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
        optional["truncate"] = given.flag("truncate", None)
    return made | {key: value for key, value in optional.items() if value is not None}


def rope_parameters(model: Any, *, fraction: bool = False) -> dict[str, Any]:
    """`rope_parameters` of a decoder whose layers all rotate alike.

    Raises:
      ConfigError: for a local base or a part of the head, where the family has none.
    """
    rope = dict(model.rope)
    if rope.get("local_theta") is not None or rope.get("local_scaling") is not None:
        raise ConfigError("rope.local_theta: only gemma3_text rotates windowed layers otherwise; export without it.")
    if not fraction and rope.get("fraction", 1.0) != 1.0:
        raise ConfigError(f"rope.fraction={rope['fraction']}: this family rotates whole heads; only gpt_neox and phi rotate a part.")
    made = one_rope(rope.get("theta", 10_000.0), rope.get("scaling"))
    return made | ({"partial_rotary_factor": float(rope.get("fraction", 1.0))} if fraction else {})


# What rope_parameters says, as older files did; removed where it is written.
OLDER_ROPE = dict.fromkeys(("rope_scaling", "rope_theta", "rope_local_base_freq", "rotary_pct", "rotary_emb_base", "partial_rotary_factor",
                            "original_max_position_embeddings"))


def one_rope(theta: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """One object of rope parameters."""
    scaling = dict(scaling or {"kind": "default"})
    made = {"rope_type": scaling.pop("kind"), "rope_theta": float(theta)}
    scaling.pop("max_position_embeddings", None)      # stands beside the object
    return made | {key: list(value) if isinstance(value, tuple) else value for key, value in scaling.items()}


def positions_limit(section: Section, key: str, default: int) -> int:
    """The number of positions that the config speaks of."""
    return section.integer(key, default, most=MAX_LENGTH)


def refuse(model: Any, family: str, **supported: Any) -> None:
    """Raises unless every setting of `supported` has its value in the model.

    Raises:
      ConfigError: naming the setting, its value and what the family has.
    """
    for key, value in {"qk_norm_whole": [False, None], **supported}.items():
        found = getattr(model, key, None)
        allowed = value if isinstance(value, list) else [value]
        if not any(_same(found, one) for one in allowed):
            raise ConfigError(f"a model with {key}={found!r} cannot be written as {family}, which has {' or '.join(map(repr, allowed))}.")


def _same(found: Any, value: Any) -> bool:
    return sorted(found) == sorted(value) if isinstance(value, tuple) and not isinstance(found, str) else found == value
