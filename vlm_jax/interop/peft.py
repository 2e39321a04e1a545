"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, for any family that has a weight table.

PEFT keeps for a module M of the base `base_model.model.M.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. Which of our `Linear`s M is, and in which order
its inputs and outputs lie, is read off the family's rows: their transform is applied to the numbers of rows and columns instead of weights. A fused module
(GPT-2's c_attn) is the several `Linear`s that it is made of.
"""
from collections.abc import Mapping
import dataclasses
import json
import math
import os
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm_jax import storage
from vlm_jax.errors import CheckpointError, ConfigError, did_you_mean
from vlm_jax.interop import families
from vlm_jax.interop.config_reader import Section, read_config
from vlm_jax.interop.safetensors import inside, open_file, refuse_pickle, show, write_file
from vlm_jax.interop.table import Row, flat, nested
from vlm_jax.nn.linear import input_axes

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MAX_RANK = 2 ** 14
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A linear module of theirs.

    Attributes:
      theirs: its name, with `{i}` where it counts layers.
      parts: the paths of our `Linear`s that it holds; columns: how many outputs each has.
      layers: the length of the layer axis, None without one.
      inputs: of each input of theirs the row of ours; outputs: of each output the column, counted through the parts.
      transposed: whether its weight is stored [in, out], which PEFT calls fan_in_fan_out.
    """
    theirs: str
    parts: tuple[str, ...]
    columns: tuple[int, ...]
    layers: int | None
    inputs: np.ndarray
    outputs: np.ndarray
    transposed: bool


def save_adapters(loaded: Any, folder: str | os.PathLike, base: str = "") -> None:
    """Writes the adapters of a model as PEFT reads them; the base is not written (`vlm_jax.save(..., format="hf")` does that).

    Adapters of the parts of a fused module that share their A become one of that rank; others one of the ranks together.

    Args:
      loaded: what `vlm_jax.load` returned, or anything with `model`, `params` (with adapters) and `config`.
      base: what adapter_config.json names as the base: a folder or a repository.
    Raises:
      ConfigError: if there is no adapter, transformers has no class for the model, or the layout cannot say what the adapters are.
      CheckpointError: if the folder cannot be written.
    """
    folder = os.path.expanduser(os.fspath(folder))
    table, modules = flat(loaded.params), _by_path(loaded)
    adapted = [path.removesuffix("/lora/a") for path in table if path.endswith("/lora/a")]
    if not adapted:
        raise ConfigError("the parameters have no adapters; add some (training/adapters.py), or write the whole model with format=\"hf\".")
    for path in adapted:
        if path not in modules:
            raise ConfigError(f"{path}: PEFT's layout has no linear module for it; merge this adapter first.")
    rates = {float(rate) for path in adapted for rate in np.ravel(table.get(f"{path}/lora/dropout", 0.0))}
    if len(rates) > 1:
        raise ConfigError(f"the adapters have several dropout rates ({', '.join(map(str, sorted(rates)))}), PEFT's layout holds one; set one rate.")
    tensors, facts, transposed = {}, {}, set()
    for module in dict.fromkeys(modules[path] for path in adapted):
        transposed.add(module.transposed)
        for layer in [None] if module.layers is None else range(module.layers):
            made = _theirs(module, table, layer)
            if made is not None:
                name = module.theirs.replace("{i}", str(layer))
                tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"], scaling = made
                facts[name] = (made[0].shape[0], scaling)
    if not facts:
        raise ConfigError("every adapter has the scaling 0; there is nothing to write.")
    if len(transposed) > 1:
        raise ConfigError("some adapted modules store their weight [in, out], others [out, in], which PEFT's layout says once for all; adapt one kind.")
    config = {**_pattern(facts), "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": transposed.pop(),
              "inference_mode": True, "init_lora_weights": True, "lora_dropout": rates.pop(), "target_modules": sorted(facts), "modules_to_save": None,
              "layers_to_transform": None, "layers_pattern": None, "use_rslora": False, "use_dora": False}
    try:
        os.makedirs(folder, exist_ok=True)
        write_file(os.path.join(folder, WEIGHTS), tensors, {"format": "pt"})
        storage.write_whole(os.path.join(folder, CONFIG), (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error}); choose a folder with room that you may write.") from error


def load_adapters(loaded: Any, folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the parameters of `loaded` with the adapters of a folder that PEFT (or `save_adapters`) wrote.

    A stack of blocks of which only some layers are adapted gets adapters of scaling 0 in the others, which `save_adapters` leaves out again.

    Raises:
      ConfigError: for a folder without adapter_config.json, or a kind of adapter that is not computed here.
      CheckpointError: for weights that are damaged, pickled, or not those of this model: names and shapes.
    """
    folder = os.path.expanduser(os.fspath(folder))
    config = Section(read_config(folder, CONFIG), f"{folder}/{CONFIG}")
    config.require("peft_type", "LORA", "LORA", "other adapters are not computed here")
    config.require("use_dora", False, False, "weights that are decomposed are not computed here")
    config.require("bias", "none", "none", "adapters train no biases here")
    if not os.path.exists(os.path.join(folder, WEIGHTS)) and os.path.exists(os.path.join(folder, PICKLE)):
        raise CheckpointError(f"{folder}/{PICKLE}: {refuse_pickle()}")
    source = open_file(inside(folder, WEIGHTS))
    known = {name: (module, layer) for module in dict.fromkeys(_by_path(loaded).values())
             for layer in ([None] if module.layers is None else range(module.layers))
             for name in [module.theirs.replace("{i}", str(layer))]}
    found: dict[str, dict[str, str]] = {}
    for name in source.names():
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in known:
            hint = did_you_mean(match[1], known)[:200] if match else " Only lora_A and lora_B of linear modules are read."
            raise CheckpointError(f"{source.where}: {show(name)} belongs to no linear module of this model.{hint}")
        if match[2] in found.setdefault(match[1], {}):
            raise CheckpointError(f"{source.where}: {show(name)} is there twice, with and without the adapter's name; remove one.")
        found[match[1]][match[2]] = name
    read = {}
    for name, pair in found.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{source.where}: {show(name)} has lora_{min(pair)} alone; fetch the file again.")
        matrices = _ours(known[name][0], source.read(pair["A"]), source.read(pair["B"]), f"{source.where}: {show(name)}")
        read[known[name]] = matrices, _scaling(config, name, source, pair)
    table = flat(loaded.params)
    present = [path for path in table if "/lora/" in path]
    if present:
        raise ConfigError(f"{present[0]}: the parameters have adapters already; merge them first.")
    rate = config.number("lora_dropout", 0.0, 0.0, 0.999)
    for module in dict.fromkeys(module for module, _ in read):
        table.update(_stacked(module, {layer: value for (owner, layer), value in read.items() if owner is module}, rate, source.where))
    return nested(table)


def _by_path(loaded: Any) -> dict[str, Module]:
    """{path of one of our `Linear`s: the module of theirs that holds it}."""
    original = loaded.config.get("hf") or {}
    family = families.family(original["model_type"]) if original else families.writer(loaded.config["model"]["name"], loaded.model)
    prefix = family.prefix(loaded.model) if callable(family.prefix) else family.prefix
    leaves, modules = flat(loaded.params), {}
    for row in family.rows(loaded.model):
        paths = () if not isinstance(row, Row) else (row.ours,) if isinstance(row.ours, str) else row.ours
        if paths and isinstance(row.theirs, str) and row.theirs.endswith(".weight") and all(path.endswith("/kernel") for path in paths):
            module = _module(row, [path.removesuffix("/kernel") for path in paths], leaves)
            if module is not None:
                name = module.theirs.removeprefix(prefix) if loaded.config.get("bare") else module.theirs
                module = dataclasses.replace(module, theirs=name)
                modules.update(dict.fromkeys(module.parts, module))
    return modules


def _module(row: Row, parts: list[str], leaves: Mapping[str, Any]) -> Module | None:
    """The module of a row; None if it is no linear map, such as a convolution."""
    stacked = int("{i}" in row.theirs)
    rows, columns, row_numbers, column_numbers = 0, [], [], []
    for part in parts:
        shape, bias = leaves[f"{part}/kernel"].shape[stacked:], leaves.get(f"{part}/bias")
        if len(shape) < 2:
            return None
        split = input_axes(part, len(shape), None if bias is None else bias.ndim - stacked)
        rows, width = math.prod(shape[:split]), math.prod(shape[split:])
        row_numbers.append(np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], (rows, width)).reshape(shape))
        column_numbers.append(np.broadcast_to(sum(columns) + np.arange(width, dtype=np.int32), (rows, width)).reshape(shape))
        columns.append(width)
    inputs, outputs = (np.asarray(row.transform.to_theirs(*numbers)) for numbers in (row_numbers, column_numbers))
    if inputs.ndim != 2:
        return None
    transposed = not (inputs == inputs[:1]).all()
    if transposed:
        inputs, outputs = inputs.T, outputs.T
    if not (inputs == inputs[:1]).all() or not (outputs == outputs[:, :1]).all():
        return None
    layers = leaves[f"{parts[0]}/kernel"].shape[0] if stacked else None
    return Module(row.theirs.removesuffix(".weight"), tuple(parts), tuple(columns), layers, inputs[0].copy(), outputs[:, 0].copy(), transposed)


def _theirs(module: Module, table: Mapping[str, Any], layer: int | None) -> tuple[np.ndarray, np.ndarray, float] | None:
    """(lora_A, lora_B, scaling) of one layer; None where the scaling is 0."""
    def leaf(part: str, name: str) -> np.ndarray:
        value = table[f"{part}/lora/{name}"]
        return np.asarray(value if layer is None else value[layer])
    present = [part for part in module.parts if f"{part}/lora/a" in table]
    scalings = {float(leaf(part, "scaling")) for part in present}
    if len(scalings) > 1:
        raise ConfigError(f"{module.theirs} holds {', '.join(present)}, whose adapters have different scalings; PEFT's layout has one: use one alpha and rank.")
    scaling = scalings.pop()
    if scaling == 0:
        return None
    down = [leaf(part, "a") for part in present]
    shared = all(np.array_equal(a, down[0]) for a in down)
    whole = down[0] if shared else np.concatenate(down, axis=1)
    up, row, column = np.zeros((whole.shape[1], sum(module.columns)), leaf(present[0], "b").dtype), 0, 0
    for part, width in zip(module.parts, module.columns):
        if part in present:
            b = leaf(part, "b")
            up[row:row + len(b), column:column + width] = b
            row += 0 if shared else len(b)
        column += width
    return np.ascontiguousarray(whole[module.inputs].T), np.ascontiguousarray(up[:, module.outputs].T), scaling


def _pattern(facts: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """r and lora_alpha of most modules, and the patterns that name the others."""
    alphas = {name: (rank, _alpha(rank, scaling)) for name, (rank, scaling) in facts.items()}
    ranks, every = [rank for rank, _ in alphas.values()], [alpha for _, alpha in alphas.values()]
    rank, alpha = max(set(ranks), key=ranks.count), max(set(every), key=every.count)
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": {re.escape(name): own for name, (own, _) in alphas.items() if own != rank},
            "alpha_pattern": {re.escape(name): own for name, (_, own) in alphas.items() if own != alpha}}


def _alpha(rank: int, scaling: float) -> int | float:
    """The alpha that gives this scaling in float32, a whole number where one does."""
    whole = round(scaling * rank)
    return whole if np.float32(whole / rank) == np.float32(scaling) else scaling * rank


def _scaling(config: Section, name: str, source: Any, pair: Mapping[str, str]) -> float:
    rank = source.shape(pair["A"])[0] if source.shape(pair["A"]) else 0
    said = _matching(config.section("rank_pattern", {}), name)
    said = config.integer("r", 8, most=MAX_RANK) if said is None else said
    if rank != said or rank < 1:
        raise CheckpointError(f"{source.where}: {show(name)} has rank {rank}, {CONFIG} says {said}; use both files of one adapter.")
    alpha = _matching(config.section("alpha_pattern", {}), name)
    alpha = config.number("lora_alpha", 8, -1e6, 1e6) if alpha is None else alpha
    return alpha / (math.sqrt(rank) if config.flag("use_rslora", False) else rank)


def _matching(patterns: Section, name: str) -> Any:
    for pattern in patterns.values:
        try:
            if len(pattern) < 512 and re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
                return patterns.number(pattern)
        except re.error as error:
            raise ConfigError(f"{patterns.where}: {show(pattern)} is no regular expression ({error}); correct it.") from None
    return None


def _ours(module: Module, down: np.ndarray, up: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(a [rows, r], b [r, columns of all parts])."""
    wanted = (len(module.inputs), len(module.outputs))
    if down.ndim != 2 or up.ndim != 2 or (down.shape[1], up.shape[0]) != wanted or down.shape[0] != up.shape[1]:
        raise CheckpointError(f"{where} has lora_A {down.shape} and lora_B {up.shape}, the module has {wanted[0]} inputs and {wanted[1]} outputs; "
                              "use an adapter of this model.")
    a, b = np.empty((wanted[0], down.shape[0]), down.dtype), np.empty((up.shape[1], wanted[1]), up.dtype)
    a[module.inputs], b[:, module.outputs] = down.T, up.T
    return a, b


def _stacked(module: Module, layers: Mapping[int | None, tuple[tuple[np.ndarray, np.ndarray], float]], rate: float, where: str) -> dict[str, Any]:
    """The leaves of a module's parts."""
    first = next(iter(layers.values()))[0]
    if any(a.shape != first[0].shape or a.dtype != first[0].dtype for (a, _), _ in layers.values()):
        raise CheckpointError(f"{where}: the layers of {show(module.theirs)} have adapters of different ranks or dtypes, which a stack of layers cannot hold.")
    missing = (tuple(np.zeros_like(part) for part in first), 0.0)
    values = [layers.get(layer, missing) for layer in ([None] if module.layers is None else range(module.layers))]

    def stack(arrays: list[Any]) -> Any:
        return jnp.asarray(arrays[0] if module.layers is None else np.stack(arrays))
    a, b, scaling = stack([a for (a, _), _ in values]), [b for (_, b), _ in values], stack([np.float32(value) for _, value in values])
    ends = np.cumsum(module.columns)
    pieces = [[piece[:, end - width:end] for piece in b] for end, width in zip(ends, module.columns)]
    said = [any(piece.any() for piece in of_part) for of_part in pieces]
    table = {}
    for part, of_part, speaks in zip(module.parts, pieces, said):
        if speaks or not any(said):      # of a fused module only what is adapted
            table.update({f"{part}/lora/a": a, f"{part}/lora/b": stack([np.ascontiguousarray(piece) for piece in of_part]), f"{part}/lora/scaling": scaling})
            if rate:
                table[f"{part}/lora/dropout"] = jnp.full(scaling.shape, rate, jnp.float32)
    return table
