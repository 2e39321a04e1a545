"""What a reader of the figures should not have to find alone: the checks of a compiled program, each one line with its remedy."""
from collections.abc import Sequence
import re

from vlm_jax.analysis.program import Program
from vlm_jax.sharding.topologies import Topology

GIB = 2 ** 30
ACTIVATION_SHARE = 0.10      # of the device's memory: a single temporary above this is named
ACTIVATION_BYTES = 2 ** 30   # where the memory is unknown
REPLICATED_LIMIT = 0.02      # of the parameters, where fsdp or tensor could split them
STATE_SHARE = 0.5            # of the memory: a replicated training state above this is named


def activation_threshold(limit: int | None) -> float:
    """Bytes above which one temporary is worth a warning."""
    return limit * ACTIVATION_SHARE if limit else ACTIVATION_BYTES


def check(program: Program, topology: Topology, memory: dict, large: Sequence[dict], grown: Sequence[dict]) -> list[dict]:
    """Returns the warnings of a program: [{"kind", "message"}], kinds fits, grows, replicated, activation, rematerialization.

    Args:
      memory: of `memory.breakdown`.
      large: of `memory.large_buffers`, above `activation_threshold`.
      grown: buffers that grow with the global batch.
    """
    found = []

    def warn(kind: str, message: str) -> None:
        found.append({"kind": kind, "message": message})
    if not memory["fits"]:
        needs = f"needs {memory['peak'] / GIB:,.2f} GiB a device" if memory["peak"] else "does not fit"
        warn("fits", f"the program {needs}, {topology.chip.name} has {(memory['limit'] or 0) / GIB:,.2f}; split the state further (mesh.fsdp), "
                     "recompute more (model.remat=full), or take a smaller batch.")
    for row in grown:
        warn("grows", f"{row['shape']} ({row['bytes'] / GIB:,.3f} GiB a device) grows with the global batch, from {_short(row['source'])}; chunk it "
                      "(task.chunked=True) or constrain its batch axis.")
    share, paths = program.replicated
    splits = max(program.mesh.get("fsdp", 1), program.mesh.get("tensor", 1)) > 1
    if splits and share > REPLICATED_LIMIT:
        warn("replicated", f"{share:.1%} of the parameters stay whole on every device ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}); "
                           "give them a rule in config.sharding.")
    elif not splits and program.devices > 1 and program.name == "train":
        state = sum(size for key, size in program.state.items() if key != "batch")
        if memory["limit"] and state > STATE_SHARE * memory["limit"]:
            warn("replicated", f"the whole training state ({state / GIB:,.2f} GiB) lies on every device; set mesh.fsdp.")
    for row in large:
        warn("activation", f"{row['shape']} is {row['bytes'] / GIB:,.2f} GiB a device, from {_short(row['source'])}; recompute it (model.remat), "
                           "or split it (mesh.tensor, mesh.sequence).")
    for operation in rematerialized(program.log):
        warn("rematerialization", f"the compiler replicates {operation} to move it between two layouts; constrain it on the way.")
    return found


def rematerialized(log: str) -> list[str]:
    """The operations for which the compiler's log complains of an involuntary full rematerialization."""
    found = []
    for line in log.splitlines():
        if "Involuntary full rematerialization" in line:
            match = re.search(r"HLO operation:?\s*%?([\w.\-]+) = (\w+\[[\d,]*\])", line)
            name = re.search(r'op_name="([^"]*)"', line)
            operation = f"{match[2]} ({_short(name[1]) if name else match[1]})" if match else "an operation"
            if operation not in found:
                found.append(operation)
    return found


def _short(source: str) -> str:
    """The end of an operation's path, which names the module."""
    return source if len(source) <= 80 else "..." + source[-77:]
