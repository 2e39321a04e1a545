"""The model families of other libraries that can be read and written: `FAMILIES` says which module knows a `model_type`; it is imported when asked for."""
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import importlib
from typing import Any

from vlm_jax.errors import ConfigError
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
      prefix: what names begin with in files of some classes and not in others (`vit.`), see `table.read`.
      renames: (regex, replacement): older layouts of names.
    """
    model_types: tuple[str, ...]
    to_settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_config: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], Rows]
    prefix: str = ""
    renames: Sequence[tuple[str, str]] = ()


# model_type of config.json -> module below vlm_jax.interop.families
FAMILIES: dict[str, str] = {
    "clip": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip2": "siglip2",
    "vit": "vit",
}

# Families of `vlm_jax.registry` -> module, for models that were not read from a directory
WRITERS: dict[str, str] = {}


def family(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
      ConfigError: for one that is not known, naming the closest.
    """
    if not isinstance(model_type, str):
        raise ConfigError(f"config.json: model_type is {model_type!r:.60}; it must be the name of a family, as siglip.")
    return importlib.import_module(f"vlm_jax.interop.families.{choose(FAMILIES, model_type[:80], 'config.json: model_type')}").FAMILY
