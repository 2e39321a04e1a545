"""Operations on images and texts: small named functions of (value, rng) that a config lists.

    image=[["decode"], ["resize", {"size": 224}], ["value_range", {"low": -1, "high": 1}]]
    text=[["lowercase"], ["tokenize", {"tokenizer": {"path": "c4.model"}, "length": 16}]]

An operation is a frozen dataclass: its fields are the settings, `operation(value, rng)` does the work. `rng` is a numpy Generator, or None for the
deterministic form that evaluation uses. `register` adds one of your own:

    @register("image", "grey")
    @dataclasses.dataclass(frozen=True)
    class Grey:
        def __call__(self, image, rng=None):
            return as_image(image).convert("L").convert("RGB")
"""
from collections.abc import Callable, Mapping, Sequence
import importlib
from typing import Any

import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.settings import call, choose, plain

KINDS = {"image": "vlm_jax.data.images", "text": "vlm_jax.data.text"}
_TABLE: dict[str, dict[str, Callable]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable:
    """Returns a class decorator that puts an operation into the table of `kind` ("image" or "text") under `name`."""
    def add(operation: Callable) -> Callable:
        known = _TABLE[kind].get(name)
        if known is not None and (known.__module__, known.__qualname__) != (operation.__module__, operation.__qualname__):
            raise ConfigError(f'The {kind} operation "{name}" exists already ({known.__module__}.{known.__qualname__}); choose another name.')
        _TABLE[kind][name] = operation
        return operation
    return add


def operations(kind: str) -> Mapping[str, Callable]:
    """Returns the table name -> operation of `kind`."""
    importlib.import_module(KINDS[kind])
    return _TABLE[kind]


def parse(listed: Sequence[Any] | None, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns (name, settings) of every entry of a config's list; an entry is `"name"`, `["name"]` or `["name", {settings}]`.

    Raises:
      ConfigError: for an entry of another form, named by its place (`processor.image[1]`).
    """
    listed = plain(listed or [])
    if not isinstance(listed, list):
        raise ConfigError(f'{where} must be a list of [operation, {{settings}}], got {listed!r}; for example [["resize", {{"size": 64}}]].')
    entries = []
    for i, entry in enumerate(listed):
        entry = [entry] if isinstance(entry, str) else entry
        well_formed = isinstance(entry, list) and len(entry) in (1, 2) and isinstance(entry[0], str)
        if not well_formed or (len(entry) == 2 and not isinstance(entry[1], dict)):
            raise ConfigError(f'{where}[{i}] must be [operation, {{settings}}], got {entry!r}; for example ["resize", {{"size": 64}}].')
        entries.append((entry[0], entry[1] if len(entry) == 2 else {}))
    return entries


def build(kind: str, listed: Sequence[Any] | None, where: str | None = None) -> list[Callable]:
    """Returns the operations that a config lists, in order.

    Raises:
      ConfigError: for an unknown operation, or a setting that it does not take, lacks or cannot use.
    """
    where = where or kind
    table, built = operations(kind), []
    for i, (name, settings) in enumerate(parse(listed, where)):
        place = f"{where}[{i}]"
        operation = choose(table, name, place)
        # An operation that learns from texts (a tokenizer being trained) sees them as the operations before it leave them.
        given = {"prepare": tuple(built)} if getattr(operation, "needs_prepare", False) else {}
        try:
            built.append(call(operation, settings, f"{place} ({name})", **given))
        except ConfigError as error:
            raise error if str(error).startswith(place) else ConfigError(f"{place} ({name}): {error}") from error
        except (TypeError, ValueError) as error:
            if hasattr(error, "exit_code"):
                raise
            raise ConfigError(f"{place} ({name}): {error}; correct its settings.") from error
    return built


def apply(listed: Sequence[Callable], value: Any, rng: np.random.Generator | None = None) -> Any:
    """Returns `value` after every operation of `listed`, in order."""
    for operation in listed:
        value = operation(value, rng)
    return value
