"""Stages: what each part of a run trains, for how long and on what; and the rules that say which parameters move."""
from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.settings import call, plain
from vlm_jax.training.clipping import read_clip
from vlm_jax.training.config import merge
from vlm_jax.training.schedules import build_schedule
from vlm_jax.training.trees import LORA, flatten, is_adapter, is_stacked, unflatten, virtual_paths

OVERRIDES = ("model", "processor", "task", "mesh")   # sections of the config that a stage may change
EMA_KEYS = ("decay", "warmup")
ACCUMULATE_KEYS = ("micro_batches", "cached")
ADAPTED_TRAIN = ((".*", None),)   # the rules of a stage with adapters that gives none: the base is frozen
INIT_FROM_KEYS = ("workdir", "previous", "step", "which", "mapping", "missing", "unexpected")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One entry of `config.stages`; every field but the last four is a key of it.

    Attributes:
      steps: how many optimiser steps it takes.
      data: {stream: settings} of what it trains on.
      train: ordered (regex, settings or None = frozen) over parameter paths; see `Rules`.
      optimizer, schedule: the settings of `build_optimizer` and `build_schedule`, each with a `name`.
      clip: the largest global norm of the gradient; None does not clip; {"norm": ..., "adaptive": rules} clips some parameters adaptively, see
        `clipping.read_clip`.
      ema: {"decay": 0.9999, "warmup": True} keeps a moving average of the parameters.
      accumulate: {"micro_batches": 4, "cached": False}; see `gradients.value_and_gradients`.
      init_from: where parameters come from, see `transfer.init_from`; a list of such sections takes one after the other (an image tower from here, a language
        model from there).
      lora: the low-rank adapters that are added after init or init_from; see `adapters.LoraSettings`. Without `train` rules the base is frozen then.
      model, processor, task, mesh: merged into the sections of the same name.
      index, first, last: its number, and the steps of the run at which it begins and ends.
      sections: model, processor, task, mesh and dtypes after merging.
    """
    steps: int
    data: Mapping[str, Any]
    train: Sequence[Sequence[Any]] = ((".*", {}),)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "adamw"})
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "cosine", "peak": 1e-3})
    clip: float | Mapping[str, Any] | None = 1.0
    ema: Mapping[str, Any] | None = None
    accumulate: Mapping[str, Any] | None = None
    init_from: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    lora: Mapping[str, Any] | None = None
    model: Mapping[str, Any] | None = None
    processor: Mapping[str, Any] | None = None
    task: Mapping[str, Any] | None = None
    mesh: Mapping[str, Any] | None = None
    index: int = 0
    first: int = 0
    last: int = 0
    sections: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def sources(self) -> list[Mapping[str, Any]]:
        """The sections of `init_from`, in order."""
        if self.init_from is None:
            return []
        return list(self.init_from) if isinstance(self.init_from, (list, tuple)) else [self.init_from]


SET_BY_PROGRAM = ("index", "first", "last", "sections")
STAGE_KEYS = tuple(field.name for field in dataclasses.fields(Stage) if field.name not in SET_BY_PROGRAM)


def stage_defaults(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stage's section of the config, as plain values, with every default filled in."""
    values = {}
    section = _with_train(section)
    for field in dataclasses.fields(Stage):
        if field.name in section:
            values[field.name] = section[field.name]
        elif field.name not in SET_BY_PROGRAM and field.name not in ("steps", "data"):
            values[field.name] = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return plain(values)


def _with_train(section: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's section with the rules that its adapters imply, where it gives none."""
    return {"train": ADAPTED_TRAIN, **section} if section.get("lora") is not None else dict(section)


def stage_sections(config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns model, processor, task, mesh and dtypes as stage `index` sees them (-1: the last stage)."""
    stage = config["stages"][index]
    sections = {name: merge(config[name], stage.get(name)) for name in OVERRIDES}
    return {**sections, "dtypes": plain(config["dtypes"])}


def read_stages(config: Mapping[str, Any]) -> list[Stage]:
    """Returns the checked stages of a config whose top level has its defaults.

    Everything that can be known without the model is checked for all stages, so that the last one does not fail after the first has trained.

    Raises:
      ConfigError: naming `stages[i].key`.
    """
    sections = plain(config["stages"])
    if not isinstance(sections, list) or not sections:
        raise ConfigError("config.stages must be a list with at least one stage; see docs/architecture.md.")
    stages, first = [], 0
    for index, section in enumerate(sections):
        where = f"stages[{index}]"
        if not isinstance(section, dict):
            raise ConfigError(f"{where} is {section!r}; it must be a mapping of settings.")
        for key in section:
            if key not in STAGE_KEYS:
                raise ConfigError(f"{where}.{key}: there is no such key.{did_you_mean(key, STAGE_KEYS)}")
        steps = section.get("steps", 0)
        if "steps" in section and (type(steps) is not int or steps < 1):
            raise ConfigError(f"{where}.steps is {steps!r}; it must be an integer of at least 1.")
        merged = stage_sections({**config, "stages": sections}, index)
        stage = call(Stage, _with_train(section), where, index=index, first=first, last=first + steps, sections=merged)
        _check(stage, where)
        stages.append(stage)
        first += steps
    return stages


def _check(stage: Stage, where: str) -> None:
    from vlm_jax.training.optimizers import check_settings
    if not isinstance(stage.data, dict) or not stage.data:
        raise ConfigError(f"{where}.data is {stage.data!r}; name at least one stream: "
                          "{\"pairs\": {\"source\": ..., \"batch_size\": ...}}.")
    read_rules(stage.train, f"{where}.train")
    check_settings(stage.optimizer, f"{where}.optimizer")
    build_schedule(stage.schedule, stage.steps, f"{where}.schedule")
    read_clip(stage.clip, f"{where}.clip")
    if stage.lora is not None:
        from vlm_jax.training.adapters import read_lora
        if not isinstance(stage.lora, dict):
            raise ConfigError(f"{where}.lora is {stage.lora!r}; it must be a mapping of settings, or None.")
        read_lora(stage.lora, f"{where}.lora")
    several = isinstance(stage.init_from, (list, tuple))
    initial = {f"init_from[{i}]" if several else "init_from": source for i, source in enumerate(stage.sources())}
    for name, keys, section in (("ema", EMA_KEYS, stage.ema), ("accumulate", ACCUMULATE_KEYS, stage.accumulate),
                                *((name, INIT_FROM_KEYS, source) for name, source in initial.items())):
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"{where}.{name} is {section!r}; it must be a mapping of settings, or None.")
        for key in section or {}:
            if key not in keys:
                raise ConfigError(f"{where}.{name}.{key}: there is no such key.{did_you_mean(key, keys)}")
    if stage.ema and not 0 <= stage.ema.get("decay", -1) < 1:
        raise ConfigError(f"{where}.ema.decay is {stage.ema.get('decay')!r}; it must be at least 0 and below 1, for example 0.9999.")
    micro = (stage.accumulate or {}).get("micro_batches", 1)
    if type(micro) is not int or micro < 1:
        raise ConfigError(f"{where}.accumulate.micro_batches is {micro!r}; it must be an integer of at least 1.")
    for name, source in initial.items():
        if bool(source.get("workdir")) == bool(source.get("previous")):
            raise ConfigError(f"{where}.{name} needs either workdir=\"RUN\" (or a directory of weights) or previous=True; set one of them.")
        if source.get("previous") and stage.index == 0:
            raise ConfigError(f"{where}.{name}.previous: there is no stage before the first; name a workdir.")


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """The settings of a rule: factors on the stage's learning rate and weight decay."""
    lr: float = 1.0
    weight_decay: float = 1.0


def read_rules(train: Sequence[Sequence[Any]], where: str) -> list[tuple[re.Pattern, Multipliers | None]]:
    """Returns the compiled rules of `stages[i].train`.

    Raises:
      ConfigError: for an entry that is not (regex, settings or None), an invalid regex, an unknown setting, or a last rule that is not `.*`.
    """
    rules = []
    if not isinstance(train, (list, tuple)) or not train:
        raise ConfigError(f"{where} must be a list of (regex, settings or None) that ends with (\".*\", ...).")
    for number, entry in enumerate(train):
        here = f"{where}[{number}]"
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ConfigError(f"{here} is {entry!r}; write (regex, settings or None), for example (\"image/.*\", None).")
        pattern, settings = entry
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f'{here}: "{pattern}" is not a regular expression ({error}); correct it.') from None
        if settings is not None and not hasattr(settings, "items"):
            raise ConfigError(f"{here}: the settings are {settings!r}; write a mapping such as {{\"lr\": 0.1}}, or None to freeze.")
        multipliers = None if settings is None else call(Multipliers, settings, here)
        for name, value in (dataclasses.asdict(multipliers) if multipliers else {}).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (name == "lr" and value == 0):
                raise ConfigError(f"{here}.{name} is {value!r}; it must be a positive factor (None instead of the settings freezes).")
        rules.append((compiled, multipliers))
    if train[-1][0] != ".*":
        raise ConfigError(f'{where}: the last rule is "{train[-1][0]}"; end with (".*", {{}}) or (".*", None), so that every parameter is decided.')
    return rules


@dataclasses.dataclass(frozen=True)
class LeafRule:
    """What the rules say of one stored parameter: numbers, or one number a layer as float32 [L, 1, ..., 1] where rules cut a stack.

    Attributes:
      moves: False if every layer is frozen.
      mask: None if every layer moves, else a boolean [L, 1, ..., 1].
      rules: the numbers of the rules that won, in order of layers.
    """
    lr: Any
    weight_decay: Any
    moves: bool
    mask: np.ndarray | None
    rules: tuple[int, ...]


class Rules:
    """`stages[i].train` applied to the parameters of a model.

    The first rule whose regex matches the whole path wins. Blocks are stored stacked, `image/blocks/mlp/up/kernel` with a leading layer axis, but
    the rules see one path a layer, `image/blocks/7/mlp/up/kernel`; where they tell layers of a stack apart, the multipliers become a vector over
    the layer axis.

    Low-rank adapters (`.../lora/a`, `.../lora/b`) are decided by the rules whose regex names `lora`, and by no other; where none does, they train at the
    stage's rates. Their scaling and dropout never train.

    Args:
      train: ordered (regex, {"lr": factor, "weight_decay": factor} or None = frozen); the last regex is `.*`.
      shapes: the parameters, as arrays or shapes.
    Raises:
      ConfigError: as `read_rules`, for a rule that decides no parameter (the last may), and if nothing is trained.
    """

    def __init__(self, train: Sequence[Sequence[Any]], shapes: Any, where: str = "train"):
        rules = read_rules(train, where)
        self.patterns = [pattern.pattern for pattern, _ in rules]
        self.shapes = {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}
        self.settings = [settings for _, settings in rules]
        self.leaves: dict[str, LeafRule] = {}
        matched, won, every_path = set(), set(), []
        given, adapting = list(enumerate(rules)), []
        if any(is_adapter(path) for path in self.shapes):
            implied = [(re.compile(f".*/{LORA}/(scaling|dropout)"), None), (re.compile(f".*/{LORA}/.*"), Multipliers())]
            numbered = list(enumerate(implied, start=len(rules)))
            adapting = [numbered[0], *((number, rule) for number, rule in given if LORA in rule[0].pattern), numbered[1]]
            self.patterns += [pattern.pattern for pattern, _ in implied]
            self.settings += [settings for _, settings in implied]
        for path, shape in self.shapes.items():
            winners = []
            for virtual in virtual_paths(path, shape):
                matching = [number for number, (pattern, _) in (adapting if is_adapter(path) else given) if pattern.fullmatch(virtual)]
                matched.update(matching)
                winners.append(matching[0])
                every_path.append(virtual)
            won.update(winners)
            self.leaves[path] = _leaf_rule(winners, self.settings, shape, is_stacked(path))
        for number, pattern in enumerate(self.patterns[:len(rules) - 1]):
            if number not in matched:
                raise ConfigError(f'{where}[{number}]: "{pattern}" matches no parameter.{did_you_mean(pattern, every_path)[:300]} '
                                  "A regex must match the whole path, as in \"image/.*\".")
            if number not in won:
                raise ConfigError(f'{where}[{number}]: "{pattern}" decides nothing, earlier rules match all of its parameters; '
                                  "move it up or remove it.")
        if not any(leaf.moves for leaf in self.leaves.values()):
            raise ConfigError(f"{where} freezes every parameter; let at least one rule train.")

    def trained(self, tree: Any) -> dict:
        """Returns the part of a tree of parameters whose leaves move, wholly or by layers."""
        return unflatten({path: leaf for path, leaf in flatten(tree).items() if self.leaves[path].moves})

    def split(self, tree: Any) -> tuple[dict, dict]:
        """Returns (the part whose leaves move, the wholly frozen part) of a tree of parameters."""
        table = flatten(tree)
        return tuple(unflatten({path: leaf for path, leaf in table.items() if self.leaves[path].moves is moves}) for moves in (True, False))

    def frozen_paths(self) -> list[str]:
        """Returns the paths of the wholly frozen parameters."""
        return [path for path, leaf in self.leaves.items() if not leaf.moves]

    def summary(self) -> str:
        """Returns a table with a line a rule: what it matches, what it sets, the parameters that it decides."""
        lines = [("rule", "trains", "tensors", "parameters")]
        for number, (pattern, settings) in enumerate(zip(self.patterns, self.settings)):
            tensors = count = 0
            for path, leaf in self.leaves.items():
                layers = leaf.rules.count(number)
                tensors += bool(layers)
                count += int(np.prod(self.shapes[path])) * layers // len(leaf.rules) if layers else 0
            trains = "frozen" if settings is None else f"lr x {settings.lr:g}, decay x {settings.weight_decay:g}"
            lines.append((pattern, trains, f"{tensors:,}", f"{count:,}"))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in lines)


def store_frozen(params: Any, rules: Rules, dtype: str | None, later: Sequence[Stage] = ()) -> Any:
    """Returns `params` with wholly frozen matrices and tables in `dtype` (the config's `dtypes.frozen`; None leaves all as they are).

    Vectors and scalars (norms, temperatures) keep their dtype: they take no memory, and are computed with in float32. A parameter that one of the `later`
    stages trains keeps it too, so that nothing that is ever trained is rounded first.
    """
    if dtype is None:
        return params
    coming = [read_rules(stage.train, f"stages[{stage.index}].train") for stage in later]

    def moves_later(path: str, shape: tuple[int, ...]) -> bool:
        return any(next((settings is not None for pattern, settings in rules if pattern.fullmatch(virtual)), True)
                   for rules in coming for virtual in virtual_paths(path, shape))

    stored = {}
    for path, leaf in flatten(params).items():
        matrix = leaf.ndim - is_stacked(path) >= 2 and not is_adapter(path) and jnp.issubdtype(leaf.dtype, jnp.floating)
        frozen = matrix and not rules.leaves[path].moves and not moves_later(path, leaf.shape)
        stored[path] = leaf.astype(dtype) if frozen else leaf
    return unflatten(stored)


def _leaf_rule(winners: Sequence[int], settings: Sequence[Multipliers | None], shape: tuple[int, ...], stacked: bool) -> LeafRule:
    moving = [settings[winner] is not None for winner in winners]
    factors = [settings[winner] or Multipliers(0.0, 0.0) for winner in winners]

    def layers(values: Sequence[Any], dtype) -> np.ndarray:
        return np.asarray(values, dtype).reshape((-1,) + (1,) * (len(shape) - 1))

    if not any(moving):
        return LeafRule(0.0, 0.0, False, None, tuple(winners))
    if not stacked or len(set(factors)) == 1 and all(moving):
        return LeafRule(float(factors[0].lr), float(factors[0].weight_decay), True, None, tuple(winners))
    return LeafRule(layers([f.lr for f in factors], np.float32), layers([f.weight_decay for f in factors], np.float32), True,
                    None if all(moving) else layers(moving, bool), tuple(winners))
