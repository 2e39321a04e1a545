"""Questions that take a second program: how large a batch fits, and what grows with the number of devices."""
from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

from vlm_jax.analysis.hlo import Module, parse
from vlm_jax.analysis.memory import global_batch_buffers, grown_buffers, memory_limit
from vlm_jax.analysis.program import Program, compile_programs
from vlm_jax.errors import ConfigError, VlmError
from vlm_jax.sharding.topologies import SHAPES, Topology, parse_topology

HEADROOM = 0.98   # of the memory: what the linear model may promise
TRIES = 3


def largest_batch(config: Mapping[str, Any], topology: Topology, program: Program, *, what: str = "train", stage: int = 0, verify: bool = True,
                  compile_jobs: Callable[..., list[Program]] = compile_programs) -> dict | None:
    """Returns {batch, rows_per_shard, bytes, verified, compiled: [[batch, bytes], ...]}: the largest batch of all streams that fits.

    Memory is taken as linear in the rows of a device: the line through the given program and one of half its rows (twice, if a device has one row; a
    smaller one still, if it does not fit) meets the device's memory at the suggestion, which is then compiled; where that does not fit after all, an
    eighth less, at most three times. Above 8 rows a device the suggestion is a multiple of 8. Without `verify` nothing is compiled and all
    that is not state is taken as proportional to the rows. None: there is no limit to keep to, or not even one row fits.
    """
    limit = memory_limit(topology)
    shards = program.mesh.get("data", 1) * program.mesh.get("fsdp", 1)
    rows = max(1, program.examples // shards)
    if limit is None:
        return None
    state = sum(size for key, size in program.state.items() if key != "batch")
    if not verify:
        if program.memory is None:
            return None
        slope = max(1.0, (program.peak - state) / rows)
        return _suggestion(_rounded((limit * HEADROOM - state) / slope), shards, None, False, [])

    known: dict[int, int] = {rows: program.peak} if program.memory is not None else {}
    tried: list[list[int]] = [[rows * shards, program.peak]]

    def peak(count: int) -> int | None:
        if count not in known:
            one = compile_jobs(config, topology, [{"what": what, "stage": stage, "batch": count * shards}])[0]
            tried.append([count * shards, one.peak])
            if one.memory is None:
                return None
            known[count] = one.peak
        return known[count]

    smaller = rows
    while not known and smaller > 1:
        smaller //= 2
        peak(smaller)
    if not known:
        return None
    first = min(known)
    second = first // 2 if first > 1 else 2 * first
    if peak(second) is None:
        return _suggestion(first, shards, known[first], True, tried)
    low, high = sorted(known)[0], sorted(known)[-1]
    slope = max(1.0, (known[high] - known[low]) / (high - low))
    guess = max(low, _rounded(high + (limit * HEADROOM - known[high]) / slope))
    for _ in range(TRIES):
        size = peak(guess)
        if size is not None and size <= limit:
            return _suggestion(guess, shards, size, True, tried)
        guess = max(1, _rounded(guess * 7 / 8))
    fitting = [count for count, size in known.items() if size <= limit]
    return _suggestion(max(fitting), shards, known[max(fitting)], True, tried) if fitting else None


def _rounded(rows: float) -> int:
    rows = math.floor(rows)
    return rows // 8 * 8 if rows >= 8 else max(rows, 0)


def _suggestion(rows: int, shards: int, size: int | None, verified: bool, tried: Sequence) -> dict | None:
    return {"batch": rows * shards, "rows_per_shard": rows, "bytes": size, "verified": verified, "compiled": list(tried)} if rows else None


def growing(config: Mapping[str, Any], topology: Topology, program: Program, module: Module, threshold: float, *, stage: int = 0, verify: bool = True,
            compile_jobs: Callable[..., list[Program]] = compile_programs) -> tuple[list[dict], str]:
    """Returns (the buffers of at least `threshold` bytes that grow with the global batch, how that was found out).

    With `verify` the program is compiled once more for half the devices with the same rows a device (the mesh axis `data` gives way), and buffers are
    compared; where no half topology or mesh exists, and without `verify`, a dimension of the size of the global batch is what tells.
    """
    half = halved(topology) if verify and program.name == "train" else None
    if half is not None and program.mesh.get("data", 1) % 2 == 0:
        try:
            smaller = compile_jobs(_free_data(config), half, [{"stage": stage, "batch": program.examples // 2}])[0]
        except (ConfigError, VlmError):
            smaller = None
        if smaller is not None and smaller.hlo:
            return grown_buffers(module, parse(smaller.hlo), 2, threshold), f"compared with {half.name}"
    return global_batch_buffers(program, module, threshold), "a dimension of the size of the global batch"


def halved(topology: Topology) -> Topology | None:
    """The same chips in half the number, or None where no such slice is made."""
    chip, shape = topology.chip, topology.shape
    if topology.name == "local" or math.prod(shape) % 2:
        return None
    shape = (math.prod(shape) // 2,) if len(shape) == 1 else next((one for one in SHAPES[chip.ici_axes] if math.prod(one) * 2 == math.prod(shape)), None)
    if shape is None:
        return None
    name = f"{chip.name}:{'x'.join(str(size) for size in shape)}" + (f"*{topology.slices}" if topology.slices > 1 else "")
    try:
        return parse_topology(name)
    except ConfigError:
        return None


def _free_data(config: Mapping[str, Any]) -> dict:
    """The resolved config with `mesh.data` taking the devices that the other axes leave."""
    from vlm_jax.training.config import resolve
    resolved = resolve(config)
    for section in [resolved, *resolved["stages"]]:
        if section.get("mesh"):
            section["mesh"] = {**section["mesh"], "data": -1}
    return resolved
