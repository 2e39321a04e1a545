"""How long a step takes at least: the time of its products, of its memory traffic and of its collectives, each alone at the hardware's peak.

    compute   executed matrix-product FLOPs of a device / peak         (recomputation included, work assumed even over the devices)
    memory    bytes through the device's memory / its bandwidth
    network   the sum over collectives of bytes sent / bandwidth of the links that the group can use

The estimate is the largest of the three, as if they overlapped perfectly; their sum, as if they did not at all, is the other end. The bandwidth of a group
on a torus: along one dimension a ring has the two links of that dimension, one of them if the dimension does not close; a group over several dimensions
has the links of all. A permutation to a neighbour has one link. Between slices each device has its share of the data-centre network, over which a
hierarchical collective sends what remains after the part inside the slice.
"""
from collections.abc import Sequence
import dataclasses
from functools import lru_cache
import time

from vlm_jax.analysis.collectives import Collective
from vlm_jax.analysis.program import Program
from vlm_jax.sharding.topologies import Chip, Topology


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peaks of one device: FLOP/s of matrix products, bytes/s of memory; None is unknown."""
    flops: float | None
    memory_bandwidth: float | None


def machine(topology: Topology, dtype: str) -> Machine:
    """The figures of the table of chips; of a CPU what is measured now, shared by the simulated devices."""
    chip = topology.chip
    if chip.platform == "cpu":
        flops, bandwidth = measure_cpu()
        return Machine(flops / topology.size, bandwidth / topology.size)
    return Machine(chip.peak(dtype), chip.memory_bandwidth)


@lru_cache
def measure_cpu() -> tuple[float, float]:
    """Measures (FLOP/s of float32 products, bytes/s of memory) of this machine, about a second each."""
    from vlm_jax.training.flops import measure_matmul_peak
    return measure_matmul_peak(seconds=1.0), measure_memory_bandwidth()


def measure_memory_bandwidth(size: int = 2 ** 26, seconds: float = 1.0) -> float:
    """Measures the bytes/s that x + 1 reads and writes, x of `size` float32: the fastest of repeated runs during about `seconds`."""
    import jax
    import jax.numpy as jnp
    x = jnp.zeros(size, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    add(x).block_until_ready()
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        add(x).block_until_ready()
        end = time.perf_counter()
        best = min(best, end - start)
        if end >= until:
            return 2 * 4 * size / best


def seconds_of(collective: Collective, program: Program, topology: Topology) -> float | None:
    """Returns the seconds a step of a collective (all its executions), or None where the network's bandwidth is not known."""
    chip = topology.chip
    if collective.pairs:
        crossing = program.places and any(program.places[a][0] != program.places[b][0] for a, b in collective.pairs)
        if topology.chip.platform == "gpu":
            crossing = any(a // chip.chips_per_host != b // chip.chips_per_host for a, b in collective.pairs)
        bandwidth = chip.dcn_bandwidth if crossing else _link(chip)
        return collective.total / bandwidth if bandwidth else None
    inside, outside = _split(collective, program, chip)
    total = 0.0
    if inside > 1:
        bandwidth = group_bandwidth(collective.members, program, topology)
        if not bandwidth:
            return None
        total += collective.total / bandwidth
    if outside > 1:
        if not chip.dcn_bandwidth:
            return None
        # Of S bytes each device holds S / inside after the part inside a slice; a ring over the slices sends this factor of it.
        whole = collective.sent * collective.group / max(collective.group - 1, 1)
        total += collective.times * whole / inside * (outside - 1) / outside / chip.dcn_bandwidth
    return total


def group_bandwidth(members: Sequence[int], program: Program, topology: Topology) -> float | None:
    """Returns the bytes/s at which a device of the group can send to the others of its slice."""
    chip = topology.chip
    if not chip.ici_bandwidth or not program.places:
        return chip.ici_bandwidth
    own = program.places[members[0]][0]
    places = [program.places[member][1:] for member in members if program.places[member][0] == own]
    share = 0.0
    for axis in range(min(chip.ici_axes, len(places[0]))):
        extent = len({place[axis] for place in places})
        if extent > 1:
            closed = extent == topology.shape[axis] and extent % chip.ici_wraps == 0
            share += 1.0 if closed else 0.5
    return chip.ici_bandwidth / chip.ici_axes * max(share, 0.5)


def _link(chip: Chip) -> float | None:
    """Bytes/s of one link, one direction."""
    if chip.ici_bandwidth is None:
        return None
    return chip.ici_bandwidth / (2 * chip.ici_axes) if chip.platform == "tpu" else chip.ici_bandwidth


def _split(collective: Collective, program: Program, chip: Chip) -> tuple[int, int]:
    """(devices of a group inside one slice or host, slices or hosts that it spans)."""
    if program.places:
        homes = [program.places[member][0] for member in collective.members]
    elif chip.platform == "gpu":
        homes = [member // chip.chips_per_host for member in collective.members]
    else:
        return collective.group, 1
    outside = len(set(homes))
    return max(1, collective.group // outside), outside


def roofline(program: Program, bytes_moved: float, collectives: Sequence[Collective], topology: Topology) -> dict:
    """Returns the estimate: {compute, memory, network: seconds or None, bound, seconds, seconds_without_overlap, mfu, mfu_without_overlap,
    examples_per_second_per_device, step's useful and executed FLOPs}; see the module's docstring for the model."""
    peaks = machine(topology, program.dtype)
    devices = program.devices
    times = [seconds_of(one, program, topology) for one in collectives]
    parts = {"compute": program.executed_flops / devices / peaks.flops if peaks.flops else None,
             "memory": bytes_moved / peaks.memory_bandwidth if peaks.memory_bandwidth else None,
             "network": sum(times) if all(value is not None for value in times) else None}
    known = {key: value for key, value in parts.items() if value is not None}
    bound = max(known, key=known.get) if known else None
    fastest, slowest = (max(known.values()), sum(known.values())) if known else (None, None)

    def mfu(seconds: float | None) -> float | None:
        return program.useful_flops / devices / peaks.flops / seconds if seconds and peaks.flops else None
    return {**parts, "bound": bound, "seconds": fastest, "seconds_without_overlap": slowest, "mfu": mfu(fastest), "mfu_without_overlap": mfu(slowest),
            "examples_per_second_per_device": program.examples / devices / fastest if fastest else None,
            "examples_per_second_per_device_without_overlap": program.examples / devices / slowest if slowest else None,
            "peak_flops": peaks.flops, "memory_bandwidth": peaks.memory_bandwidth}


def seconds_by_axis(program: Program, collectives: Sequence[Collective], topology: Topology) -> dict[tuple[str, tuple[str, ...]], float | None]:
    """Returns {(kind, axes): seconds a step}."""
    rows: dict[tuple, float | None] = {}
    for one in collectives:
        key, value = (one.kind, one.axes), seconds_of(one, program, topology)
        rows[key] = None if value is None or rows.get(key, 0.0) is None else rows.get(key, 0.0) + value
    return rows
