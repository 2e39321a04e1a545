"""From a config section to a call: each section is the keyword arguments of exactly one function or dataclass."""
from collections.abc import Callable, Mapping
import inspect
from typing import Any

from vlm_jax.errors import ConfigError, did_you_mean


def plain(value: Any) -> Any:
    """Returns `value` with every mapping (ConfigDict, FrozenDict) as a dict and every tuple or list as a list: what JSON can hold."""
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def call(function: Callable, settings: Mapping[str, Any] | None, where: str, **given: Any) -> Any:
    """Calls `function(**given, **settings)` after comparing `settings` with its signature.

    Args:
      settings: the config section; None is an empty one.
      where: the section's path in the config (`stages[0].optimizer`), named in errors.
      given: arguments that the caller supplies and that the config may not set.
    Raises:
      ConfigError: for a key that the function does not take, one that it needs and does not get, or one that is not the config's to set.
    """
    settings = dict(settings or {})
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given]
    for key in settings:
        if key in given:
            raise ConfigError(f"{where}.{key} is set by the program; remove it from the config.")
        if key not in names and not takes_any:
            raise ConfigError(f"{where}.{key}: {_name(function)} takes no such setting.{did_you_mean(key, names)}")
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in settings:
            raise ConfigError(f"{where}.{name} is missing: {_name(function)} needs it; add it to the config.")
    return function(**given, **settings)


def choose(table: Mapping[str, Any], name: str, where: str) -> Any:
    """Returns `table[name]`, or raises a ConfigError naming `where` and the closest known name."""
    if name not in table:
        raise ConfigError(f'{where}: "{name}" is unknown.{did_you_mean(name, table)}')
    return table[name]


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
