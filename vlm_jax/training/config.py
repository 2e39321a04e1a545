"""Configs: Python files read at the edge, then plain dicts, checked key by key, and config.json in the workdir.

A config file is a program and runs when it is loaded. What evaluation, resuming and inference read back is only ever config.json.
"""
from collections.abc import Mapping, Sequence
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import ml_collections as ml

from vlm_jax import storage
from vlm_jax.errors import CheckpointError, ConfigError, did_you_mean
from vlm_jax.settings import choose, plain
from vlm_jax.training.config_values import assign, parse_text, section_keys, split_list

SCHEMA_VERSION = 1
REQUIRED = object()   # marks a key that every config sets itself
VARIANTS = ("full", "test")
DTYPES = ("float32", "bfloat16", "float16")

# The top level of a config: every key that there is, with its default. A key outside this table is an error.
CONFIG_KEYS: dict[str, Any] = {
    "schema_version": SCHEMA_VERSION,
    "name": REQUIRED,
    "seed": 0,
    "model": REQUIRED,
    "processor": REQUIRED,
    "task": REQUIRED,
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "sharding": None,   # [[regex, tactic], ...]; None: the rules of vlm_jax.sharding
    "topology": None,   # what mesh and sharding were made for, as v5e-256; other devices are taken as well where the mesh fits them
    "dtypes": {"params": "float32", "compute": "float32", "softmax": "float32"},
    "stages": REQUIRED,
    "evaluations": {},
    "checkpoint": {"every": 1000, "minutes": None, "keep": 2, "keep_every": None, "keep_hours": None},
    "log_every": 10,
    "guard": {"nonfinite": "stop", "spike": None, "in_a_row": 10},
    "watchdog": {"seconds": 1800},
    "sdc_check_every": None,    # every so many steps one is taken twice and compared (silent_corruption.py)
}
SECTIONS = ("model", "processor", "task", "mesh", "dtypes", "evaluations", "checkpoint", "guard", "watchdog")   # the keys above that hold a mapping


def parse_arg(arg: str | None, **defaults: Any) -> ml.ConfigDict:
    """Reads a config's argument, the `key=value,key=value` after the colon; commas inside brackets and braces do not separate.

    Args:
      arg: the text; None and "" are all defaults. `key` alone sets a boolean.
      defaults: every key with its default, whose type is the type of the value.
    Returns:
      the values, as attributes.
    Raises:
      ConfigError: for an unknown key, a value of the wrong type, or a `variant` other than full and test.
    """
    values = dict(defaults)
    for item in split_list(arg or ""):
        key, equals, text = item.partition("=")
        key = key.strip()
        if key not in defaults:
            raise ConfigError(f'config argument "{key}" is unknown.{did_you_mean(key, defaults)}')
        if not equals and not isinstance(defaults[key], bool):
            raise ConfigError(f'config argument "{key}" has no value; write {key}=VALUE.')
        values[key] = parse_text(text, defaults[key], f"config argument {key}") if equals else True
    if values.get("variant") not in (None, *VARIANTS):
        raise ConfigError(f'config argument variant="{values["variant"]}" is unknown.{did_you_mean(values["variant"], VARIANTS)}')
    return ml.ConfigDict(values)


def load_config(path_with_arg: str) -> ml.ConfigDict:
    """Runs a config file, `FILE.py[:ARG]`, and returns what its `get_config(ARG)` returns.

    A path that does not exist is looked for among the configs that the package ships, so that `configs/siglip/emoji.py` works from any folder.

    Raises:
      ConfigError: if there is no such file, it is not a config, or `get_config` refuses the argument.
    """
    text = os.fspath(path_with_arg)
    before, extension, after = text.partition(".py:")
    path, arg = (before + ".py", after) if extension else (text, None)
    file = _find(path)
    specification = importlib.util.spec_from_file_location("vlm_jax_config_" + file.stem, file)
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid Python ({error.msg}); correct the line.") from error
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path}: not a config, it defines no get_config(arg); define it, returning an ml_collections.ConfigDict.")
    config = module.get_config(arg)
    if not hasattr(config, "items"):
        raise ConfigError(f"{path}: get_config returned {type(config).__name__}; return an ml_collections.ConfigDict.")
    return config if isinstance(config, ml.ConfigDict) else ml.ConfigDict(dict(config))


def shipped_configs() -> list[str]:
    """Returns the paths of the configs in the package, as `configs/FAMILY/NAME.py`: the files that define `get_config`."""
    root = _shipped_root()
    files = (file for file in root.glob("*/*.py") if "def get_config(" in file.read_text(encoding="utf-8"))
    return sorted("configs/" + file.relative_to(root).as_posix() for file in files)


def apply_overrides(config: Mapping[str, Any], overrides: Sequence[str]) -> ml.ConfigDict:
    """Returns a copy of `config` with values replaced: `seed=1`, `config.model.preset=test`, `stages.0.steps=10`.

    The text is read as a Python literal of the type that the value has. Sections that may be left out of a config (mesh, clip ...) can be set too.
    Keys inside model, task, data and evaluations are checked when those are built.

    Raises:
      ConfigError: for an unknown key, an index beyond a list, a value of the wrong type or an override without `=`.
    """
    values = _with_defaults(plain(config), complete=False)
    for override in overrides:
        key, equals, text = override.removeprefix("--").removeprefix("config.").partition("=")
        if not equals or not key:
            raise ConfigError(f'override "{override}" has no value; write KEY=VALUE, for example seed=1.')
        assign(values, key.split("."), text, CONFIG_KEYS)
    return ml.ConfigDict(values)


def merge(config: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict:
    """Returns `config` with `overrides` laid over it: mappings merge key by key, everything else (lists too) is replaced.

    A section whose `name` changes is replaced as a whole, because the settings of one thing are not those of another.
    """
    merged, overrides = plain(config), plain(overrides or {})
    if "name" in overrides and "name" in merged and overrides["name"] != merged["name"]:
        return overrides
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def resolve(config: Mapping[str, Any]) -> dict:
    """Returns the config as plain dicts and lists with every default filled in, checked, ready for config.json; resolving twice changes nothing.

    Raises:
      ConfigError: for an unknown or missing key, a section that is not a mapping, a stage that cannot work, a value that JSON cannot hold.
    """
    from vlm_jax.training.stages import read_stages, stage_defaults
    values = plain(config)
    for key in values:
        if key not in CONFIG_KEYS:
            raise ConfigError(f"config.{key}: there is no such key.{did_you_mean(key, CONFIG_KEYS)}")
    if values.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ConfigError(f"config.schema_version is {values['schema_version']}, this version of vlm_jax writes {SCHEMA_VERSION}; remove the key.")
    values = _with_defaults(values, complete=True)
    for section in SECTIONS:
        if not isinstance(values[section], dict):
            raise ConfigError(f"config.{section} is {values[section]!r}; it must be a mapping of settings.")
        known = section_keys([section], values)
        for key in values[section]:
            if known is not None and key not in known:
                raise ConfigError(f"config.{section}.{key}: there is no such key.{did_you_mean(key, known)}")
    for key, least in (("seed", 0), ("log_every", 1)):
        if not isinstance(values[key], int) or isinstance(values[key], bool) or values[key] < least:
            raise ConfigError(f"config.{key} is {values[key]!r}; it must be an integer of at least {least}.")
    _check_sections(values)
    read_stages(values)
    values["stages"] = [stage_defaults(stage) for stage in values["stages"]]
    _check_json(values, "config")
    return values


def save_config(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict:
    """Writes the resolved config to `workdir/config.json`, making the folder, and returns it.

    Raises:
      CheckpointError: if the workdir cannot be written.
    """
    resolved = resolve(config)
    try:
        storage.write_whole(os.path.join(os.fspath(workdir), "config.json"), (json.dumps(resolved, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{workdir}: cannot write config.json ({error.strerror or error}); choose a workdir that you may write.") from error
    return resolved


def load_saved(workdir: str | os.PathLike) -> dict:
    """Returns the resolved config of a run from `workdir/config.json`, as written; no Python file of the workdir is run.

    Raises:
      CheckpointError: if there is none, it is not JSON, or another schema version wrote it.
    """
    from etils import epath
    path = epath.Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{workdir}: no config.json here; name the --workdir of a training run.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); restore it, or train again in a new workdir.") from error
    version = config.get("schema_version") if isinstance(config, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema_version is {version}, this version of vlm_jax reads {SCHEMA_VERSION}; use the version that wrote it.")
    return config


def _shipped_root() -> Path:
    import vlm_jax
    return Path(vlm_jax.__file__).parent / "configs"


def _find(path: str) -> Path:
    """Returns the config file that `path` names, on disk or among the shipped ones."""
    if Path(path).is_file():
        return Path(path).absolute()
    parts = Path(path).parts
    inside = parts[parts.index("configs") + 1:] if "configs" in parts else parts
    shipped = _shipped_root().joinpath(*inside) if not Path(path).is_absolute() else None
    if shipped is not None and shipped.is_file():
        return shipped
    names = shipped_configs()
    hint = did_you_mean(path if "configs" in parts else f"configs/{path}", names)
    raise ConfigError(f"--config {path}: there is no such file.{hint}")


def _with_defaults(values: dict, *, complete: bool) -> dict:
    """Fills in the optional keys of the top level (mappings key by key); with `complete`, missing required ones are errors."""
    filled = {}
    for key, default in CONFIG_KEYS.items():
        if default is REQUIRED:
            if key not in values and complete:
                raise ConfigError(f"config.{key} is missing; add it to the config.")
            if key in values:
                filled[key] = values[key]
        elif isinstance(default, dict) and isinstance(values.get(key, default), dict):
            filled[key] = {**default, **values.get(key, {})}
        else:
            filled[key] = values.get(key, default)
    filled.update({key: value for key, value in values.items() if key not in CONFIG_KEYS})   # for `resolve` to refuse
    return filled


def _check_sections(values: Mapping[str, Any]) -> None:
    """Raises a ConfigError for dtypes, checkpoint, guard, watchdog or evaluations that cannot work."""
    for key, name in values["dtypes"].items():
        choose(dict.fromkeys(DTYPES), name, f"config.dtypes.{key}")
    from vlm_jax.training.guard import read_guard
    for key, kind in (("keep", int), ("every", int), ("keep_every", int), ("minutes", float), ("keep_hours", float)):
        value, optional = values["checkpoint"].get(key), key != "keep"
        whole = kind is int
        right = type(value) is int and value >= 1 if whole else type(value) in (int, float) and value > 0
        if not (right or optional and value is None):
            raise ConfigError(f"config.checkpoint.{key} is {value!r}; it must be {'an integer of at least 1' if whole else 'a positive number'}"
                              f"{', or None' if optional else ''}.")
    read_guard(values["guard"], "config.guard")
    seconds = values["watchdog"]["seconds"]
    if seconds is not None and (type(seconds) not in (int, float) or not seconds > 0):
        raise ConfigError(f"config.watchdog.seconds is {seconds!r}; it must be a positive number, or None for no watchdog.")
    every = values["sdc_check_every"]
    if every is not None and (type(every) is not int or every < 1):
        raise ConfigError(f"config.sdc_check_every is {every!r}; it must be an integer of at least 1, or None for no check.")
    for name, settings in values["evaluations"].items():
        where = f"config.evaluations.{name}"
        if not isinstance(settings, dict) or "evaluator" not in settings:
            from vlm_jax.evaluation import EVALUATORS
            raise ConfigError(f"{where}.evaluator is missing; name one of {', '.join(EVALUATORS)}.")
        every = settings.get("every")
        if every is not None and (type(every) is not int or every < 1):
            raise ConfigError(f"{where}.every is {every!r}; it must be an integer of at least 1, or None for the end only.")


def _check_json(value: Any, where: str) -> None:
    """Raises a ConfigError naming the first value that JSON cannot hold."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{where}.{index}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise ConfigError(f"{where} is a {type(value).__name__}; a config holds numbers, text, booleans, None, lists and mappings only.")
