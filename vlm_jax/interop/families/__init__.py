"""The model families of other libraries that can be read and written: `FAMILIES` says which module knows a `model_type`; it is imported when asked for."""
from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import importlib
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.safetensors import show
from vlm_jax.interop.table import Rows
from vlm_jax.settings import choose


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family of models is stored.

    Attributes:
      model_types: what `model_type` in config.json may be.
      to_settings: from config.json (a dict) to {"name": family of the registry, settings of the model}; reads it through `config_reader.Section`,
        which checks kind and range of every number.
      to_config: from a model to the config.json that transformers reads.
      rows: from a model to its weight table.
      by_tensors: from settings and the names of the tensors to settings, for what only the tensors say (whether a head is there); None: nothing.
      prefix: what names begin with in files of some classes and not in others (`vit.`), see `table.read`; a function of the model where that decides it.
      renames: (regex, replacement): other layouts of names.
    """
    model_types: tuple[str, ...]
    to_settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_config: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], Rows]
    by_tensors: Callable[[dict[str, Any], Collection[str]], dict[str, Any]] | None = None
    prefix: str | Callable[[Any], str] = ""
    renames: Sequence[tuple[str, str]] = ()


# model_type of config.json -> module below vlm_jax.interop.families
FAMILIES: dict[str, str] = {
    "clip": "clip", "clip_text_model": "clip", "clip_vision_model": "clip",
    "siglip": "siglip", "siglip_text_model": "siglip", "siglip_vision_model": "siglip",
    "siglip2": "siglip2", "siglip2_text_model": "siglip2", "siglip2_vision_model": "siglip2",
    "vit": "vit",
    "paligemma": "paligemma",
    "pix2struct": "pix2struct",
    "idefics": "idefics",
    "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "gemma": "llama", "gemma2": "llama", "gemma3_text": "llama",
    "gpt2": "gpt2", "opt": "opt", "gpt_neox": "gpt_neox", "phi": "phi", "mpt": "mpt", "mosaic_gpt": "mpt",
    "t5": "t5", "mt5": "t5", "umt5": "t5",
    "bert": "bert",
}

# family of `vlm_jax.registry` -> module that writes its models, where they were not read from such a directory
WRITERS: dict[str, str] = {
    "siglip": "siglip", "siglip2": "siglip2", "clip": "clip", "vit": "vit", "text": "siglip", "naflex_vit": "siglip2",
    "paligemma": "paligemma", "pix2struct": "pix2struct", "idefics": "idefics",
    "decoder": "decoder", "encoder_decoder": "t5", "bert": "bert",
}

NULL = object()   # as a value of what `to_config` returns: null in config.json. None there removes the key.


def family(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
      ConfigError: for one that is not known, naming the closest.
    """
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json: model_type is {show(model_type)}; it must be the name of a family, as siglip.")
    name = model_type if model_type in FAMILIES else show(model_type)[1:-1]
    return _load(choose(FAMILIES, name, "config.json: model_type"))


def writer(name: str, model: Any) -> Family:
    """The family that writes a model of a name of `vlm_jax.registry`. Towers go to the family whose choices they have: class token, norm, causality.

    Raises:
      ConfigError: for one that transformers does not have.
    """
    if name == "vit":
        return _load("clip" if model.norm_before else "vit" if model.pool == "cls" else "siglip")
    if name == "text":
        return _load("clip" if model.causal else "siglip")
    return _load(choose(WRITERS, name, 'model.name, written as format="hf"'))


def _load(module: str) -> Family:
    return importlib.import_module(f"vlm_jax.interop.families.{module}").FAMILY
