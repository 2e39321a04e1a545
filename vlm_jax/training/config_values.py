"""Texts to values for config arguments and overrides, and which keys a section of a config may have."""
import ast
from collections.abc import Mapping, Sequence
import inspect
from typing import Any

from vlm_jax.errors import ConfigError, did_you_mean

MISSING = object()   # the present value of a key that is legal, but not set
OPENING, CLOSING = "([{", ")]}"


def split_list(text: str) -> list[str]:
    """Splits at the commas outside brackets and braces (`shards-{0,1}.tar` stays whole) and drops empty items."""
    items, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in OPENING) - (character in CLOSING)
        if character == "," and depth <= 0:
            items.append(text[start:place])
            start = place + 1
    items.append(text[start:])
    return [item for item in items if item.strip()]


def parse_text(text: str, present: Any, where: str) -> Any:
    """Returns `text` as a value of the type of `present`: a Python literal, or the text itself where `present` is text.

    `None` is allowed for everything but text, an integer for a float, `true` and `false` for booleans. Where `present` is None or MISSING any
    literal goes, and what is no literal is text.

    Raises:
      ConfigError: if the type is another one.
    """
    if isinstance(present, str):
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
        return text[1:-1] if quoted else text
    value = {"true": True, "false": False, "none": None, "null": None}.get(text.strip().lower(), MISSING)
    if value is MISSING:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
    value = _lists(value)
    if present is None or present is MISSING or value is None:
        return value
    if isinstance(present, float) and type(value) is int:
        return float(value)
    if type(present) is int and isinstance(value, float) and value.is_integer() and "e" in text.lower():
        return int(value)   # 1e6 steps
    if type(value) is not type(present):
        raise ConfigError(f"{where}={text} is {_kind(value)}, it must be {_kind(present)} like {present!r}.")
    return value


def assign(config: dict, keys: Sequence[str], text: str, top: Mapping[str, Any]) -> None:
    """Sets the value at `keys` inside nested dicts and lists, in place.

    Args:
      keys: the path; digits index lists.
      top: the legal keys of the top level.
    Raises:
      ConfigError: naming the part of the path that does not exist, with the closest that does.
    """
    node: Any = config
    for depth, key in enumerate(keys):
        where = "config." + ".".join(keys[:depth + 1])
        if isinstance(node, list):
            index = _index(key, node, where)
            present, key = node[index], index
        elif isinstance(node, dict):
            known = list(top) if depth == 0 else section_keys(keys[:depth], config)
            if key not in node and known is not None and key not in known:
                raise ConfigError(f"{where}: there is no such key.{did_you_mean(key, set(known) | set(node))}")
            present = node.get(key, MISSING)
        else:
            raise ConfigError(f"{where}: config.{'.'.join(keys[:depth])} is {node!r} and has no keys; set it as a whole, for example "
                              f"{'.'.join(keys[:depth])}={{'{key}': {text}}}.")
        if depth == len(keys) - 1:
            node[key] = parse_text(text, present, where)
        else:
            if present is MISSING or present is None:
                present = node[key] = {}
            node = present


def section_keys(path: Sequence[str], config: Mapping[str, Any]) -> list[str] | None:
    """Returns the legal keys of the section at `path`, or None where only the function that gets the section knows them (model, task, data ...)."""
    from vlm_jax.training.optimizers import OPTIMIZERS
    from vlm_jax.training.schedules import SCHEDULES
    from vlm_jax.training.stages import ACCUMULATE_KEYS, EMA_KEYS, INIT_FROM_KEYS, STAGE_KEYS
    match list(path):
        case ["mesh"] | ["stages", _, "mesh"]:
            return ["data", "fsdp", "tensor", "sequence", "expert", "slices"]
        case ["processor"] | ["stages", _, "processor"]:
            return ["image", "text", "format"]
        case ["dtypes"]:
            return ["params", "compute", "softmax", "frozen"]
        case ["checkpoint"]:
            return ["every", "minutes", "keep", "keep_every", "keep_hours"]
        case ["guard"]:
            return ["nonfinite", "spike", "in_a_row"]
        case ["guard", "spike"]:
            return ["window", "sigmas", "action"]
        case ["watchdog"]:
            return ["seconds"]
        case ["stages", _]:
            return list(STAGE_KEYS)
        case ["stages", index, ("optimizer" | "schedule") as section]:
            table = OPTIMIZERS if section == "optimizer" else SCHEDULES
            stage = config["stages"][int(index)]
            function = table.get((stage.get(section) or {}).get("name"))
            return None if function is None else ["name", *(key for key in inspect.signature(function).parameters if key != "steps")]
        case ["stages", _, "ema"]:
            return list(EMA_KEYS)
        case ["stages", _, "accumulate"]:
            return list(ACCUMULATE_KEYS)
        case ["stages", _, "init_from"] | ["stages", _, "init_from", _]:
            return list(INIT_FROM_KEYS)
    return None


def _index(key: str, values: list, where: str) -> int:
    try:
        index = int(key)
    except ValueError:
        raise ConfigError(f"{where}: this is a list of {len(values)}; give an index, 0 to {len(values) - 1}, instead of \"{key}\".") from None
    if not -len(values) <= index < len(values):
        raise ConfigError(f"{where}: the list has {len(values)} entries; indices go from 0 to {len(values) - 1}.")
    return index % len(values)


def _lists(value: Any) -> Any:
    """Tuples become lists, as everywhere in a resolved config."""
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _lists(item) for key, item in value.items()}
    return value


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), type(value).__name__)
