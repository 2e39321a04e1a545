"""Memory of a compiled program: what a device holds, which buffers are large, and how many bytes a step moves through the device's memory.

Figures of memory are XLA's own; those of traffic are counted in the optimised HLO, where every instruction outside a fusion reads its operands and writes
its results once, loops as often as they run, and what the compiler keeps on the chip (VMEM of a TPU) costs nothing.
"""
from collections.abc import Mapping
from itertools import pairwise
import os
import re

from vlm_jax.analysis.hlo import Buffer, Instruction, Module
from vlm_jax.analysis.program import Program
from vlm_jax.sharding.topologies import Topology

# Instructions that name a buffer, or start what another one finishes, and touch no memory themselves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id", "replica-id",
        "optimization-barrier", "async-start", "async-update", "async-done", "domain", "add-dependency"}
FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")


def memory_limit(topology: Topology) -> int | None:
    """Bytes that a device may use: the chip's, or of simulated and local CPU devices their share of the machine's memory."""
    if topology.chip.memory_bytes is not None:
        return topology.chip.memory_bytes
    if topology.chip.platform != "cpu":
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // topology.size


def breakdown(program: Program, topology: Topology) -> dict:
    """Returns {parameters, optimizer, ..., batch, temporaries, code, peak, limit, share, fits}: bytes a device, peak / limit and whether it fits.

    `peak` counts arguments, temporaries, code and those results that are not written over an argument. A program that does not fit has only
    the state's bytes and, as `peak`, what the compiler says it needs (0 where it does not say).
    """
    limit = memory_limit(topology)
    parts = {"parameters" if key == "params" else key: size for key, size in program.state.items() if size}
    if program.memory is not None:
        kept = max(0, program.memory["output"] - program.memory["alias"])
        parts |= {"results": kept} if kept else {}
        parts |= {"temporaries": program.memory["temp"], "code": program.memory["code"]}
    fits = program.memory is not None and (limit is None or program.peak <= limit)
    return {**parts, "peak": program.peak, "limit": limit, "share": program.peak / limit if limit else None, "fits": fits}


def large_buffers(module: Module, threshold: float) -> list[dict]:
    """Returns the temporaries of at least `threshold` bytes, one row a shape: {shape, bytes, source (operation that makes it), count}, the largest first.

    Arrays of the shape of an argument count as that argument's update and are left out.
    """
    arguments = {(buffer.dtype, buffer.dims) for one in module.computations[module.entry].values() if one.opcode == "parameter" for buffer in one.buffers}
    rows: dict[tuple, dict] = {}
    for name in module.runs():
        for instruction in module.computations[name].values():
            if instruction.opcode in FREE - {"while"} or instruction.opcode.endswith("-done"):
                continue
            for buffer in instruction.buffers:
                if buffer.space or buffer.bytes < threshold or (buffer.dtype, buffer.dims) in arguments:
                    continue
                row = rows.setdefault((buffer.dtype, buffer.dims), {"shape": str(buffer), "bytes": buffer.bytes, "source": instruction.source, "count": 0})
                row["count"] += 1
                if len(row["source"]) < len(instruction.source) and instruction.opcode != "while":
                    row["source"] = instruction.source
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def grown_buffers(program: Module, smaller: Module, factor: int, threshold: float) -> list[dict]:
    """Returns the buffers of `program` that exist in `smaller` with one dimension divided by `factor`, where every device has as many rows in both.

    `smaller` is the same program on `factor` times fewer devices with the same rows a device. What then differs by that factor in a buffer of one
    device scales with the global batch, as a gathered batch of embeddings does.
    """
    mine = {(row["shape"]): row for row in large_buffers(program, threshold)}
    theirs = {buffer for name in smaller.runs() for one in smaller.computations[name].values() for buffer in one.buffers}
    known = {(buffer.dtype, buffer.dims) for buffer in theirs}
    rows = []
    for row in mine.values():
        dtype, dims = _read(row["shape"])
        if (dtype, dims) in known:
            continue
        shrunk = [(*dims[:k], size // factor, *dims[k + 1:]) for k, size in enumerate(dims) if size % factor == 0]
        if any((dtype, shape) in known for shape in shrunk):
            rows.append(row)
    return rows


def global_batch_buffers(program: Program, module: Module, threshold: float) -> list[dict]:
    """Returns the buffers with a dimension of the size of a stream's global batch: what growing with it looks like in one program alone.

    The size tells only where a device has fewer rows than the batch, no argument has a dimension of that size, and it is not the rows of a device times a
    dimension that goes with them (128 rows of 256 patches are as many as 128 rows on each of 256 devices).
    """
    shards = _shards(program.mesh)
    if shards == 1:
        return []
    arguments = {size for one in module.computations[module.entry].values() if one.opcode == "parameter" for buffer in one.buffers for size in buffer.dims}
    pairs = {pair for name in module.runs() for one in module.computations[name].values() for buffer in one.buffers for pair in pairwise(buffer.dims)}
    telling = {rows for rows in program.rows.values() if rows > 1 and rows not in arguments and (rows // shards, shards) not in pairs}
    return [row for row in large_buffers(module, threshold) if telling & set(_read(row["shape"])[1])]


def traffic(module: Module) -> float:
    """Returns the bytes that one step reads from and writes to a device's memory."""
    total = 0.0
    for name, times in module.runs().items():
        computation = module.computations[name]
        total += times * sum(_bytes(module, one, computation) for one in computation.values())
    return total


def _bytes(module: Module, one: Instruction, computation: Mapping[str, Instruction]) -> float:
    if one.opcode in FREE or one.opcode.endswith("-done") or (one.opcode == "custom-call" and any(f'"{name}"' in one.attributes for name in FREE_CALLS)):
        return 0.0
    operands = [computation[name] for name in one.operands if name in computation]
    if one.opcode.endswith("-start"):   # the result lists operands and contexts as well
        return float(sum(operand.bytes() for operand in operands) + sum(_largest(one.buffers)))
    if one.opcode == "fusion" and (inner := one.called("calls")) and inner[0] in module.computations:
        return _fusion_bytes(module, inner[0], one, operands)
    if one.opcode == "dynamic-update-slice":
        return 2.0 * operands[1].bytes() if len(operands) > 1 else 0.0
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * one.bytes()
    return float(one.bytes() + sum(operand.bytes() for operand in operands))


def _largest(buffers: tuple[Buffer, ...]) -> list[int]:
    """The result among the leaves of an asynchronous start: the last large one in main memory."""
    sizes = [buffer.bytes for buffer in buffers if buffer.space == 0]
    return [sizes[-1]] if len(sizes) > 1 and sizes[-1] > 64 else sizes[:0]


def _fusion_bytes(module: Module, name: str, fusion: Instruction, operands: list[Instruction]) -> float:
    """A fusion reads of an operand that it only slices the slices, and writes of an array that it updates in place the update."""
    inner = module.computations[name]
    users: dict[str, list[Instruction]] = {}
    for one in inner.values():
        for operand in one.operands:
            users.setdefault(operand, []).append(one)

    def read(parameter: str, whole: float) -> float:
        total = 0.0
        for user in users.get(parameter, []):
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter:
                total += user.bytes() or sum(buffer.bytes for buffer in user.buffers)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter:
                continue
            elif user.opcode == "bitcast":
                total += read(user.name, whole)
            else:
                return whole
        return min(total, whole)

    total = 0.0
    for one in inner.values():
        if one.opcode == "parameter" and int(one.arguments) < len(operands):
            whole = float(operands[int(one.arguments)].bytes())
            total += read(one.name, whole) if whole else 0.0
    root = module.root(name)
    outputs = [inner[operand] for operand in root.operands if operand in inner] if root.opcode == "tuple" else [root]
    for buffer, output in zip(fusion.buffers, outputs, strict=False):
        while output.opcode == "bitcast" and output.operands[0] in inner:
            output = inner[output.operands[0]]
        if buffer.space:
            continue
        if output.opcode == "dynamic-update-slice" and len(output.operands) > 1 and output.operands[1] in inner:
            total += sum(update.bytes for update in inner[output.operands[1]].buffers)
        else:
            total += buffer.bytes
    return total


def _read(shape: str) -> tuple[str, tuple[int, ...]]:
    dtype, dims = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()
    return dtype, tuple(int(size) for size in dims.split(",") if size)


def _shards(mesh: Mapping[str, int]) -> int:
    return mesh.get("data", 1) * mesh.get("fsdp", 1)
