"""Reading config.json of others: every value is checked for kind and range before anything is made of it."""
from collections.abc import Iterable, Mapping, Sequence
import math
import os
from typing import Any

from vlm_jax.errors import CheckpointError, ConfigError, did_you_mean
from vlm_jax.interop.safetensors import inside, read_json, show

MAX_CONFIG_BYTES = 8 * 2 ** 20
REQUIRED = object()
# The largest sizes that are believed; each is far above any published model.
MAX_WIDTH, MAX_DEPTH, MAX_HEADS, MAX_VOCABULARY, MAX_LENGTH, MAX_PIXELS = 2 ** 17, 1024, 4096, 2 ** 24, 2 ** 26, 2 ** 14


class Section:
    """A config, or a section of one, whose values are asked for by kind; `where` names it in errors.

    Every method raises a ConfigError for a value of another kind or outside its range, and, without a default, for a missing one. A key that is
    null counts as missing.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} must be an object, got {show(values)}; fetch the file again.")
        self.values, self.where = values, where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1, most: int = MAX_LENGTH) -> int:
        """A whole number in [least, most]."""
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self._bad(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = REQUIRED, least: float = -1e30, most: float = 1e30) -> float:
        """A number in [least, most]."""
        value = self._get(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not least <= value <= most:
            raise self._bad(key, value, f"a number from {least} to {most}")
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self._get(key, default)
        if value is not default and type(value) is not bool:
            raise self._bad(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED, among: Sequence[str] | Mapping[str, Any] | None = None) -> str:
        """A string; one of `among`."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
            raise self._bad(key, value, "a short printable string")
        if among is not None and value not in among:
            raise ConfigError(f"{self.where}.{key}: {show(value)} is not supported.{did_you_mean(ascii(value), among)}")
        return value

    def integers(self, key: str, default: Any = REQUIRED, least: int = 0, most: int = MAX_LENGTH, longest: int = MAX_DEPTH) -> list[int]:
        """A list of whole numbers; one number is a list of itself."""
        value = self._get(key, default)
        if value is default:
            return value
        listed = value if isinstance(value, list) else [value]
        if len(listed) > longest or not all(type(item) is int and least <= item <= most for item in listed):
            raise self._bad(key, value, f"at most {longest} whole numbers from {least} to {most}")
        return list(listed)

    def numbers(self, key: str, default: Any = REQUIRED, longest: int = MAX_DEPTH) -> list[float]:
        """A list of numbers."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, list) or len(value) > longest or not all(type(item) in (int, float) and abs(item) < 1e30 for item in value):
            raise self._bad(key, value, f"a list of at most {longest} numbers")
        return [float(item) for item in value]

    def texts(self, key: str, default: Any = REQUIRED, among: Sequence[str] | None = None, longest: int = MAX_DEPTH) -> list[str]:
        """A list of strings, each one of `among`."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, list) or len(value) > longest or not all(isinstance(item, str) and (among is None or item in among) for item in value):
            raise self._bad(key, value, f"a list of at most {longest} strings" + (f" of {', '.join(among)}" if among else ""))
        return list(value)

    def section(self, key: str, default: Any = REQUIRED) -> "Section":
        """An object inside this one."""
        return Section(self._get(key, default), f"{self.where}.{key}")

    def heads(self, width: int, key: str = "num_attention_heads", default: Any = REQUIRED) -> int:
        """The number of heads of attention, which divides `width`."""
        value = self.integer(key, default, most=MAX_HEADS)
        if width % value:
            raise self._bad(key, value, f"a divisor of the width {width}")
        return value

    def require(self, key: str, value: Any, default: Any, why: str) -> None:
        """Raises unless `key` is `value` (or missing, where `default` is it): what this library does not compute must not be read as if it did."""
        found = self.values.get(key)
        found = default if found is None else found
        if found != value or type(found) is not type(value):
            raise ConfigError(f"{self.where}.{key}: {show(found)} is not supported, only {show(value)}: {why}.")

    def architecture(self, known: Iterable[str] | None = None) -> str | None:
        """The class of the reference that the weights are of, the first of `architectures`; None where it is not said.

        Raises:
          ConfigError: if it is said and none of `known`, where these are given.
        """
        listed = self.texts("architectures", None, longest=16)
        if listed and known is not None and listed[0] not in known:
            raise ConfigError(f"config.json: architectures is {listed[0]!a:.60}; of this family {', '.join(known)} are known.")
        return listed[0] if listed else None

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ConfigError(f"{self.where}.{key} is missing; fetch the file again.")
        return default

    def _bad(self, key: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(f"{self.where}.{key}: {show(value)} is not {wanted}; fetch the file again.")


def is_directory(path: str) -> bool:
    """Whether a folder holds a model in the Hugging Face layout: a config.json that is not a run's."""
    return os.path.isfile(os.path.join(path, "config.json")) and "schema_version" not in read_config(path)


def read_config(folder: str, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in `folder/config.json`, of bounded size.

    Raises:
      ConfigError: if it is missing or no JSON object.
    """
    path = os.path.join(folder, name)
    try:
        return read_json(inside(folder, name), MAX_CONFIG_BYTES)
    except CheckpointError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(path) else f"{path}: {message}") from None
