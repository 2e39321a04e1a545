"""Layouts by name: the mesh of a topology, and the rules that lay out the parameters of a transformer on it.

    replicated     every device holds the whole model; the batch is split (`data`)
    fsdp           parameters, moments and averages are split over `fsdp`, an axis that splits the batch as well; gathered where they are used
                   (Rajbhandari et al., "ZeRO" (2020), stage 3)
    tensor         attention by heads and MLPs by columns, then rows, over `tensor`, so that a block needs two sums over the axis; embedding tables by
                   entries (Shoeybi et al., "Megatron-LM" (2019), section 3)
    fsdp_tensor    both
    auto           the first of replicated, fsdp, fsdp_tensor, with the smallest axes, that keeps the training state within a quarter of the memory

Over several slices `data` spans them, so that only gradients travel the slow network between slices.
"""
from collections.abc import Mapping
import math
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.sharding.mesh import AXES, mesh_sizes
from vlm_jax.sharding.topologies import Topology, parse_topology

FSDP = 128        # widths of the published sizes are multiples of 128, so that their kernels divide by any power of two up to it
TENSOR = 4        # divides the heads of the published sizes (12, 16)
STATE_BYTES = 16  # of training a parameter: itself, its gradient and two moments in float32
STATE_SHARE = 4   # the state may take a quarter of the memory; activations need the rest
SMALL = 100_000_000   # where nobody knows the memory (CPU), models above this are split

# What does not divide by `tensor` (heads, those of keys and values are perhaps fewer, an MLP's width, a vocabulary) takes another axis, and is gathered where
# it is used, or stays whole: |-.
# The layer axis of stacked blocks comes first, so that axes are counted from the end.
_TENSOR_RULES = (
    (".*/(query|key|value)/kernel", "tensor:-2|-3|-"),      # [width, heads, head_dim]
    (".*/(query|key|value)/bias", "tensor:-2|-"),
    (".*/out/kernel", "tensor:-3|-1|-"),                    # [heads, head_dim, width]; its bias is added after the sum and stays whole
    (".*/mlp/(gate|up)/kernel", "tensor:-1|-2|-"),
    (".*/mlp/(gate|up)/bias", "tensor:-1|-"),
    (".*/mlp/down/kernel", "tensor:-2|-1|-"),
    (r".*\bhead/kernel", "tensor:-1|-2|-"),                  # [width, vocabulary]
    # An adapter's products split as its kernel's: B of columns by columns, A of rows by rows; the rank stays whole.
    (".*/(query|key|value|gate|up)/lora/a", "replicate"),
    (".*/(query|key|value|gate|up)/lora/b", "tensor:-1|-"),
    (".*/(out|down)/lora/a", "tensor:-2|-"),
    (".*/(out|down)/lora/b", "replicate"),
)
_SMALL_TABLES = (r".*\brelative_bias", "replicate")          # a few numbers a head, read by every layer
# Entries over `fsdp`: split by width instead, the lookup would hold the tokens of the global batch.
_TABLE = r".*\btoken_embedding"
_VECTORS = (".*/(bias|scale)", "replicate")   # gathering a vector in every layer would cost more in latency than it saves in memory
RULES: dict[str, tuple[tuple[str, str], ...] | None] = {
    "replicated": None,
    "fsdp": ((_TABLE, "fsdp:0|1|-"), _VECTORS, _SMALL_TABLES, (".*", "fsdp")),
    "tensor": (*_TENSOR_RULES, (_TABLE, "tensor:0|1|-"), _VECTORS, _SMALL_TABLES, (".*", "tensor")),
    "fsdp_tensor": (*((pattern, tactic if pattern.endswith("bias") else f"{tactic},fsdp") for pattern, tactic in _TENSOR_RULES), _VECTORS,
                    _SMALL_TABLES, (_TABLE, "fsdp:0|-,tensor:1|-"), (".*", "fsdp,tensor")),
}
LAYOUTS = (*RULES, "auto")


def layout(name: str, topology: str | Topology | None = None, parameters: int | None = None) -> dict[str, Any]:
    """Returns {"mesh": settings of `make_mesh`, "sharding": rules for `parameter_shardings` or None}, the sections of a config.

    `data` is -1: it takes the devices that are there, so that the same layout works on more slices, or fewer.

    Args:
      name: one of `LAYOUTS`.
      topology: what it is for, a name for `parse_topology`; None: any devices. It bounds `fsdp` and `tensor` to what a slice has.
      parameters: of the model; "auto" needs it.
    Raises:
      ConfigError: for an unknown name or topology, "auto" without `parameters`, or a model too large for the topology however it is split.
    """
    if name not in LAYOUTS:
        raise ConfigError(f'layout "{name}" is unknown; choose one of {", ".join(LAYOUTS)}.{did_you_mean(name, LAYOUTS)}')
    if isinstance(topology, str):
        topology = parse_topology(topology)
    if name == "auto":
        name, fsdp, tensor = _automatic(topology or parse_topology("local"), parameters)
    else:
        devices = topology.devices_per_slice if topology else None
        tensor = (math.gcd(TENSOR, devices) if devices else TENSOR) if "tensor" in name else 1
        fsdp = (math.gcd(FSDP, devices // tensor) if devices else -1) if "fsdp" in name else 1
    mesh = {"data": 1 if fsdp == -1 else -1, "fsdp": fsdp, "tensor": tensor, "slices": topology.slices if topology else 1}
    rules = RULES[name]
    return {"mesh": mesh, "sharding": None if rules is None else [list(rule) for rule in rules]}


def _automatic(topology: Topology, parameters: int | None) -> tuple[str, int, int]:
    """(name, fsdp, tensor) of the layout that splits the model no further than it must be."""
    if parameters is None:
        raise ConfigError('layout "auto" needs the number of parameters; pass parameters=..., or name a layout.')
    devices, memory = topology.devices_per_slice, topology.chip.memory_bytes
    if memory is None:
        return ("replicated", 1, 1) if parameters <= SMALL else ("fsdp", math.gcd(FSDP, devices), 1)

    def fits(parts: int) -> bool:
        return parameters * STATE_BYTES <= memory / STATE_SHARE * parts

    if fits(1):
        return "replicated", 1, 1
    sizes = [2 ** power for power in range(1, FSDP.bit_length()) if devices % 2 ** power == 0]
    for fsdp in sizes:
        if fits(fsdp):
            return "fsdp", fsdp, 1
    for tensor in (2, TENSOR):
        fsdp = math.gcd(FSDP, devices // tensor) if devices % tensor == 0 else 0
        if fsdp and fits(fsdp * tensor):
            return "fsdp_tensor", fsdp, tensor
    raise ConfigError(f"layout: {parameters:,} parameters take {parameters * STATE_BYTES / 1e9:,.0f} GB to train, more than a quarter of the memory of a slice "
                      f"of {topology.name} ({devices} devices of {memory / 1e9:.0f} GB); choose a larger topology.")


def abstract_mesh(topology: str | Topology, mesh: Mapping[str, Any]) -> AbstractMesh:
    """The mesh of a topology without its devices: enough to lay out parameters (`parameter_shardings`) and to check that they divide.

    Args:
      mesh: the section of the config, the settings of `make_mesh`.
    Raises:
      ConfigError: if the sizes do not fit the topology.
    """
    topology = parse_topology(topology) if isinstance(topology, str) else topology
    sizes, _ = mesh_sizes(topology.size, slices=topology.slices, **{key: value for key, value in mesh.items() if key in AXES})
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
