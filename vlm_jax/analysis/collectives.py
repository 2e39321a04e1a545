"""The collectives of a compiled program: kind, bytes and mesh axes of each, as often as it runs.

Bytes a device *sends* in one execution, as rings do it, for n devices in a group and an array of S bytes (all-gather: its result; reduce-scatter: its
operand):

    all-gather, reduce-scatter, all-to-all   S (n - 1) / n
    all-reduce                               2 S (n - 1) / n       a reduce-scatter and an all-gather
    collective-permute, collective-broadcast S

An asynchronous collective counts at its start. A TPU fuses the parts of one with other work, even with a loop's; they too count at the start alone.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import math
import re

import numpy as np

from vlm_jax.analysis.hlo import Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")

_GROUPS = re.compile(r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\(.*?\)(?=[ ,]))?,? *\{[^}]*\}"   # mesh axes
                     r"|\{(?:\{[\d,]*\},?)*\}"                                                # lists
                     r"|\[[^\]]*\]<=\[[^\]]*\](?:T\([\d,]*\))?)")                               # iota


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      axes: the mesh axes along which the devices of a group differ; () if every group is one device.
      group: devices of a group.
      payload: S, bytes of the array (see the module's docstring).
      sent: bytes that a device sends in one execution.
      times: executions a step.
      pairs: of a collective-permute, its (source, target) pairs.
      members: the first group, as positions in the mesh.
    """
    kind: str
    axes: tuple[str, ...]
    group: int
    payload: int
    sent: float
    times: float
    members: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    source: str = ""

    @property
    def total(self) -> float:
        """Bytes that a device sends in one step."""
        return self.sent * self.times


def find_collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns every collective that moves bytes between devices.

    Args:
      mesh: {axis: size} in the order of the mesh; device k of the program is the k-th of the flattened mesh.
    """
    found = []
    for name, times in module.runs().items():
        for instruction, fused_in in _instructions(module, name):
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or (fused_in is not None and _is_continued(module, fused_in)):
                continue
            if kind == "all-reduce" and fused_in is not None and _is_scattered(module, fused_in, instruction):
                kind = "reduce-scatter"
            collective = _collective(kind, instruction, module.computations[fused_in or name], mesh, times)
            if collective.group > 1 or collective.pairs:
                found.append(collective)
    return found


def summarise(collectives: Sequence[Collective]) -> list[dict]:
    """Returns one row for each (kind, axes): {kind, axes, group, count (executions a step), bytes (sent by a device a step)}, the largest first."""
    rows: dict[tuple, dict] = {}
    for one in collectives:
        row = rows.setdefault((one.kind, one.axes), {"kind": one.kind, "axes": list(one.axes), "group": one.group, "count": 0.0, "bytes": 0.0})
        row["count"] += one.times
        row["bytes"] += one.total
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def bytes_by_axis(collectives: Sequence[Collective]) -> dict[str, float]:
    """Returns {"data", "data,fsdp", ...: bytes that a device sends a step over groups along these axes}."""
    totals: dict[str, float] = {}
    for one in collectives:
        key = ",".join(one.axes)
        totals[key] = totals.get(key, 0.0) + one.total
    return dict(sorted(totals.items()))


def replica_groups(attributes: str, devices: int) -> np.ndarray | list[list[int]]:
    """Returns the groups of a collective as lists of device numbers; without any, all devices are one group.

    Reads the three forms that XLA prints: `{{0,1},{2,3}}`, the iota `[2,2]<=[2,2]T(1,0)`, and mesh axes
    `mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}`, where an axis may be cut: `'a':(2)2` is its factor of 2 after one of 2.
    Raises:
      ValueError: for a form that is none of these.
    """
    match = _GROUPS.search(attributes)
    if match is None:
        if "replica_groups=" in attributes:
            raise ValueError(f"replica groups in an unknown form: {attributes[attributes.index('replica_groups='):][:120]}")
        return [list(range(devices))]
    text = match[1]
    if text.startswith("mesh"):
        return _mesh_groups(text, devices)
    if text.startswith("["):
        shape, _, order = text.partition("<=")
        return _iota(order).reshape([int(size) for size in shape.strip("[]").split(",")])
    groups = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    return groups or [list(range(devices))]


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 in that shape, transposed, flat."""
    dims = [int(size) for size in re.search(r"\[([\d,]+)\]", text)[1].split(",")]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    order = re.search(r"T\(([\d,]+)\)", text)
    return (numbers.transpose([int(axis) for axis in order[1].split(",")]) if order else numbers).reshape(-1)


def _mesh_groups(text: str, devices: int) -> np.ndarray:
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", text[:text.index("]")])]
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{"):])
    ids = re.search(r"device_ids=\((.*)\)", text)
    if ids is None:
        numbers = np.arange(math.prod(size for _, size in axes))
    elif "[" in ids[1]:
        numbers = _iota(ids[1])
    else:
        numbers = np.array([int(number) for number in ids[1].split(",")])
    cuts = {name: (int(before or 1), int(size or 0)) for name, before, size in chosen}
    shape, moved = [], []
    for name, size in axes:   # a cut axis becomes three: before, the factor, after
        if name in cuts:
            before, factor = cuts[name]
            factor = factor or size
            moved.append(len(shape) + 1)
            shape += [before, factor, size // (before * factor)]
        else:
            shape.append(size)
    grid = np.moveaxis(numbers.reshape(shape), moved, range(len(shape) - len(moved), len(shape)))
    return grid.reshape(-1, math.prod(shape[axis] for axis in moved))


def axes_of(groups: Sequence[Sequence[int]] | np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of any group differ."""
    names, sizes = list(mesh), tuple(mesh.values())
    varying: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.asarray(group, int), sizes))
        varying |= {name for name, row in zip(names, places) if len(set(row.tolist())) > 1}
    return tuple(name for name in names if name in varying)


def _instructions(module: Module, name: str):
    """(instruction, the fusion's computation or None) of a computation, the insides of its fusions included."""
    for instruction in module.computations[name].values():
        yield instruction, None
        if instruction.opcode in ("fusion", "async-start") or (instruction.opcode == "custom-call" and "called_computations" in instruction.attributes):
            for called in instruction.called("calls") + instruction.called("called_computations"):
                if instruction.opcode != "async-start":   # its computation runs of its own
                    for inner in module.computations.get(called, {}).values():
                        yield inner, called


def _is_continued(module: Module, computation: str) -> bool:
    """Whether a fusion carries on or ends a collective that another one has begun."""
    targets = " ".join(one.attributes for one in module.computations[computation].values() if one.opcode == "custom-call")
    return "AsyncCollectiveStart" not in targets and ("AsyncCollectiveDone" in targets or computation.startswith("async_collective_fusion"))


def _is_scattered(module: Module, computation: str, reduce: Instruction) -> bool:
    """Whether a fusion keeps only this device's slice of the sum: how a TPU writes a reduce-scatter."""
    instructions = module.computations[computation]
    users = [one for one in instructions.values() if reduce.name in one.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _collective(kind: str, instruction: Instruction, computation: Mapping[str, Instruction], mesh: Mapping[str, int], times: float) -> Collective:
    results = [buffer.bytes for buffer in instruction.buffers if buffer.dims or len(instruction.buffers) == 1 or kind == "all-reduce"]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":   # (operands, results, contexts)
        operands = sum(computation[name].bytes(buffer_space) for name in instruction.operands if name in computation
                       for buffer_space in {buffer.space for buffer in computation[name].buffers})
        results = [max(sum(results) - operands, operands) if kind == "all-gather" else operands]
    size = sum(results)
    if kind in ("collective-permute", "collective-broadcast") and "source_target_pairs" in instruction.attributes:
        listed = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes)
        pairs = tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", listed[0])) if listed else ()
        moving = [pair for pair in pairs if pair[0] != pair[1]]
        return Collective(kind, axes_of(moving, mesh), 2 if moving else 1, size, float(size), times, tuple(moving[0]) if moving else (), tuple(moving),
                          instruction.source)
    groups = replica_groups(instruction.attributes, math.prod(mesh.values()))
    n = len(groups[0])
    if kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter"):
        size *= n
    factor = {"all-reduce": 2 * (n - 1) / n, "collective-broadcast": 1.0}.get(kind, (n - 1) / n)
    return Collective(kind, axes_of(groups, mesh), n, size, size * factor, times, tuple(int(member) for member in groups[0]), (), instruction.source)
