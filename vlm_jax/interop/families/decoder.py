"""Writes decoders that were not read from a directory: the layout is the one whose family computes what the model does."""
from collections.abc import Mapping
from typing import Any

from vlm_jax.interop import families
from vlm_jax.interop.config_reader import Section
from vlm_jax.interop.table import Rows

MODEL_TYPES = ("llama", "gpt2", "opt", "gpt_neox", "phi", "mpt")


def model_type(model: Any) -> str:
    """The family of a decoder by what tells them apart; whether it has all that the model needs, its `to_config` says."""
    if model.positions in ("alibi", "learned"):
        return "mpt" if model.positions == "alibi" else "opt" if model.position_offset else "gpt2"
    if model.norm != "layer":
        return "llama"
    return "phi" if model.shared_norm else "gpt_neox"


def to_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `Decoder`, as the family of `model_type` reads them."""
    return families.family(Section(config).text("model_type", among=MODEL_TYPES)).to_settings(config)


def to_config(model: Any) -> dict[str, Any]:
    """config.json.

    Raises:
      ConfigError: naming a setting that the closest family does not have.
    """
    return families.family(model_type(model)).to_config(model)


def rows(model: Any) -> Rows:
    """The weight table."""
    return families.family(model_type(model)).rows(model)


FAMILY = families.Family(MODEL_TYPES, to_settings, to_config, rows)
