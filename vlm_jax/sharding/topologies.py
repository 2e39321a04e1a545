"""Chips and how they are wired: the one table of peaks, memories and bandwidths, and the names of topologies, present or absent.

    v5e-256          a Cloud TPU accelerator name; of v4 and v5p the number counts TensorCores, two a chip (v5p-128 is 64 chips), of v5e and v6e chips
    v5p:4x4x8        the same by shape, in chips
    v5e:16x16*4      four such slices over the data-centre network
    h100-8, cpu-8    GPUs, simulated CPU devices
    local            the devices of this process
"""
from collections.abc import Mapping
import dataclasses
from functools import lru_cache
import math
import os
import re
from typing import Any

import jax

from vlm_jax.absent_tpu import ABSENT_TPU
from vlm_jax.errors import ConfigError, did_you_mean

GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device as JAX counts them. Figures are None where nobody publishes them (or, on CPU, where they have to be measured).

    Attributes:
      kinds: what `device.device_kind` starts with.
      memory_bytes: what a program may use: for TPUs the limit that libtpu 0.0.42 compiles against, below the chip's nominal memory.
      peak_flops: {dtype: dense matrix-product FLOP/s}. A product of float32 on a TPU runs in bfloat16 passes: one by default, so that the
        bfloat16 peak holds.
      memory_bandwidth: bytes/s of the device memory.
      ici_bandwidth: bytes/s that a device sends over all its links together, one direction (half of what data sheets call bidirectional).
      ici_axes: dimensions of the torus; a ring along one of them has `ici_bandwidth / ici_axes`. 1 where a switch joins the devices of a host.
      ici_wraps: a dimension of the torus closes into a ring if its size is a multiple of this.
      dcn_bandwidth: bytes/s that a device's share of the network between slices (TPU) or hosts (GPU) carries, one direction.
      cores_per_device: TensorCores of one device; on v4 and v5p both of a chip's work as one ("megacore").
      devices_per_chip: JAX devices of a chip.
      chips_per_host: chips that one process drives where a slice has several hosts.
      source: where the figures are from; `unverified` names the fields for which no published figure was found in those pages.
    """
    name: str
    platform: str
    kinds: tuple[str, ...]
    memory_bytes: int | None
    peak_flops: Mapping[str, float] = dataclasses.field(hash=False)
    memory_bandwidth: float | None
    ici_bandwidth: float | None
    ici_axes: int
    dcn_bandwidth: float | None
    chips_per_host: int
    source: str
    unverified: tuple[str, ...] = ()
    cores_per_device: int = 1
    devices_per_chip: int = 1
    ici_wraps: int = 4

    def peak(self, dtype: str = "bfloat16") -> float | None:
        """Returns the FLOP/s of dense matrix products in `dtype`, or of bfloat16 where the table has no figure for it."""
        return self.peak_flops.get(str(dtype), self.peak_flops.get("bfloat16"))


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that need not be there: `shape` in chips of one slice, and the number of slices."""
    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one slice."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def size(self) -> int:
        """JAX devices of all slices."""
        return self.devices_per_slice * self.slices

    @property
    def present(self) -> bool:
        """Whether these devices are those of this process (`local`, GPUs) or simulated by it (CPU), so that programs can run on them."""
        return self.chip.platform != "tpu" or self.name == "local"

    @property
    def devices(self) -> list[Any]:
        """The devices, as a mesh takes them; of an absent TPU they can be compiled for, not run on.

        A shape that libtpu refuses aborts the process, so ask in a child process (`vlm_jax.analysis.program` does).
        Raises:
          ConfigError: if libtpu is missing, or devices that must be present are not.
        """
        return list(_devices(self))


CLOUD = "docs.cloud.google.com/tpu/docs"
NVIDIA = "NVIDIA data sheet, dense"
# TPU: peak, bandwidths from Cloud TPU's page of each generation (read November 2026); memory from the compiler's own message when a program is too large.
# GPU: data sheets without sparsity; dcn_bandwidth assumes one 400 Gb/s adapter a GPU (A100: 200), as in the vendors' own eight-GPU servers.
_CHIPS = (
    Chip("v2", "tpu", ("TPU v2",), 8 * GIB, {"bfloat16": 22.5e12}, 350e9, None, 2, None, 4, f"{CLOUD}/v2", ("memory_bytes", "memory_bandwidth"),
         devices_per_chip=2),
    Chip("v3", "tpu", ("TPU v3",), 16 * GIB, {"bfloat16": 61.5e12}, 450e9, None, 2, None, 4, f"{CLOUD}/v3", ("memory_bytes", "memory_bandwidth"),
         devices_per_chip=2),
    Chip("v4i", "tpu", ("TPU v4 lite",), 8 * GIB, {"bfloat16": 138e12}, 614e9, None, 1, None, 4, "Jouppi et al. 2021", ("memory_bandwidth",)),
    Chip("v4", "tpu", ("TPU v4",), int(30.75 * GIB), {"bfloat16": 275e12, "int8": 275e12}, 1200e9, 300e9, 3, 6.25e9, 4, f"{CLOUD}/v4",
         ("ici_bandwidth", "dcn_bandwidth"), cores_per_device=2),
    Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), {"bfloat16": 197e12, "int8": 393e12}, 819e9, 200e9, 2, 3.125e9, 4, f"{CLOUD}/v5e",
         ici_wraps=16),
    Chip("v5p", "tpu", ("TPU v5p", "TPU v5"), int(95.74 * GIB), {"bfloat16": 459e12}, 2765e9, 600e9, 3, 6.25e9, 4, f"{CLOUD}/v5p", cores_per_device=2),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), int(31.25 * GIB), {"bfloat16": 918e12, "int8": 1836e12}, 1638e9, 400e9, 2, 12.5e9, 4, f"{CLOUD}/v6e",
         ("dcn_bandwidth",), ici_wraps=16),
    Chip("v100", "gpu", ("Tesla V100",), 32 * GIB, {"bfloat16": 125e12}, 900e9, 150e9, 1, 12.5e9, 8, NVIDIA, ("memory_bytes", "dcn_bandwidth")),
    Chip("t4", "gpu", ("Tesla T4",), 16 * GIB, {"bfloat16": 65e12}, 320e9, None, 1, None, 4, NVIDIA, ("peak_flops", "memory_bandwidth")),
    Chip("a10g", "gpu", ("NVIDIA A10G",), 24 * GIB, {"bfloat16": 70e12}, 600e9, None, 1, None, 4, NVIDIA, ("peak_flops", "memory_bandwidth")),
    Chip("a100", "gpu", ("NVIDIA A100",), 80 * GIB, {"bfloat16": 312e12, "float32": 156e12}, 2039e9, 300e9, 1, 25e9, 8, NVIDIA, ("dcn_bandwidth",)),
    Chip("l4", "gpu", ("NVIDIA L4",), 24 * GIB, {"bfloat16": 121e12}, 300e9, None, 1, None, 8, NVIDIA, ("peak_flops", "memory_bandwidth")),
    Chip("l40s", "gpu", ("NVIDIA L40S",), 48 * GIB, {"bfloat16": 362e12}, 864e9, None, 1, None, 8, NVIDIA, ("peak_flops", "memory_bandwidth")),
    Chip("h100-pcie", "gpu", ("NVIDIA H100 PCIe",), 80 * GIB, {"bfloat16": 756e12}, 2000e9, 300e9, 1, 50e9, 8, NVIDIA,
         ("memory_bandwidth", "ici_bandwidth", "dcn_bandwidth")),
    Chip("h100", "gpu", ("NVIDIA H100",), 80 * GIB, {"bfloat16": 989e12, "float32": 494e12}, 3350e9, 450e9, 1, 50e9, 8, NVIDIA, ("dcn_bandwidth",)),
    Chip("h200", "gpu", ("NVIDIA H200", "NVIDIA GH200"), int(141e9), {"bfloat16": 989e12, "float32": 494e12}, 4800e9, 450e9, 1, 50e9, 8, NVIDIA,
         ("dcn_bandwidth",)),
    Chip("b200", "gpu", ("NVIDIA B200",), int(180e9), {"bfloat16": 2250e12}, 8000e9, 900e9, 1, 50e9, 8, NVIDIA, ("dcn_bandwidth",)),
    Chip("cpu", "cpu", ("cpu",), None, {}, None, None, 1, None, 1, "measured on the machine at hand", ("peak_flops", "memory_bandwidth")),
)
CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}

# Slices that Cloud TPU offers, in chips. Cubes of 64 chips (v4, v5p) combine to any multiple of 4 in each dimension besides.
SHAPES: dict[int, tuple[tuple[int, ...], ...]] = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16)),
}
COMPILED_FOR = ("v4", "v5e", "v5p", "v6e")   # what libtpu describes without the hardware
MEGACORE = {"v4": {"chip_config_name": "megacore"}}   # libtpu's description of a v4 has two devices a chip unless asked; JAX on a v4 machine has one


def chip_of(device: Any) -> Chip | None:
    """Returns the table's row of a JAX device, or None for a kind that it does not have."""
    matches = [(kind, chip) for chip in CHIPS.values() for kind in chip.kinds if device.device_kind.startswith(kind)]
    return max(matches, key=lambda match: len(match[0]))[1] if matches else None


def parse_topology(name: str) -> Topology:
    """Returns the topology of a name: see the module's docstring for the forms.

    Raises:
      ConfigError: for an unknown chip, or a number or shape that is not made.
    """
    text = str(name).strip().lower()
    if text == "local":
        devices = jax.devices()
        chip = chip_of(devices[0]) or dataclasses.replace(CHIPS["cpu"], name=devices[0].device_kind, platform=devices[0].platform)
        return Topology("local", chip, (len(devices),))
    match = re.fullmatch(r"([a-z0-9-]+?)(?:-(\d+)|:(\d+(?:x\d+)*))(?:\*(\d+))?", text)
    if match is None or match[1] not in CHIPS:
        chip = match[1] if match else re.split(r"[:*-]", text)[0]
        raise ConfigError(f'topology "{name}": give CHIP-NUMBER, CHIP:SHAPE, CHIP:SHAPE*SLICES or local, as v5e-256, v5p:4x4x8, v5e:16x16*4; the chips are '
                          f"{', '.join(CHIPS)}.{did_you_mean(chip, CHIPS)}")
    chip, slices = CHIPS[match[1]], int(match[4] or 1)
    if slices < 1:
        raise ConfigError(f'topology "{name}": {slices} slices; give at least 1.')
    if match[3]:
        shape = tuple(int(size) for size in match[3].split("x"))
    else:
        shape = _shape(chip, int(match[2]), name)
    if chip.platform == "tpu" and chip.name in COMPILED_FOR:
        _check_shape(chip, shape, name)
    elif math.prod(shape) < 1:
        raise ConfigError(f'topology "{name}" has no device; give at least 1.')
    return Topology(text, chip, shape, slices)


def _shape(chip: Chip, number: int, name: str) -> tuple[int, ...]:
    """The shape in chips of an accelerator name's number."""
    if chip.platform != "tpu" or chip.name not in COMPILED_FOR:
        return (number,)
    cores = chip.cores_per_device
    known = {math.prod(shape) * cores: shape for shape in SHAPES[chip.ici_axes]}
    if number not in known:
        counts = f"the number counts TensorCores, {cores} a chip" if cores > 1 else "the number counts chips"
        raise ConfigError(f'topology "{name}": {counts}; {chip.name} is made with {", ".join(str(n) for n in sorted(known))}, or give the shape.')
    return known[number]


def _check_shape(chip: Chip, shape: tuple[int, ...], name: str) -> None:
    known = SHAPES[chip.ici_axes]
    cubes = chip.ici_axes == 3 and len(shape) == 3 and all(size >= 4 and size % 4 == 0 for size in shape) and math.prod(shape) <= 8960
    if shape not in known and not cubes:
        made = ", ".join("x".join(str(size) for size in one) for one in known)
        raise ConfigError(f'topology "{name}": no slice of {chip.name} has the shape {"x".join(str(size) for size in shape)}; choose one of {made}'
                          f'{", or multiples of 4 in each of three dimensions" if chip.ici_axes == 3 else ""}.')


@lru_cache
def _devices(topology: Topology) -> tuple[Any, ...]:
    if topology.name == "local":
        return tuple(jax.devices())
    if topology.chip.platform == "tpu":
        if topology.chip.name not in COMPILED_FOR:
            raise ConfigError(f"topology {topology.name}: libtpu describes {', '.join(COMPILED_FOR)} only; choose one of these.")
        return tuple(_describe(topology))
    platform = topology.chip.platform
    try:
        present = jax.devices(platform)
    except RuntimeError:
        present = []
    if platform == "gpu" and present and chip_of(present[0]) is not topology.chip:
        present = []
    if len(present) < topology.size:
        remedy = (f"start Python with XLA_FLAGS=--xla_force_host_platform_device_count={topology.size}" if platform == "cpu"
                  else "run it where they are: only TPUs are described without being there")
        raise ConfigError(f"topology {topology.name} needs {topology.size} {platform} devices, {len(present)} of that kind are present; {remedy}.")
    return tuple(present[:topology.size])


def _describe(topology: Topology) -> list[Any]:
    for key, value in ABSENT_TPU.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies
    options: dict[str, Any] = dict(MEGACORE.get(topology.chip.name, {}))
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    shape = "x".join(str(size) for size in topology.shape)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.chip.name}:{shape}", **options).devices
    except Exception as error:   # whatever the plug-in raises when it cannot be loaded
        raise ConfigError(f"topology {topology.name}: libtpu cannot describe it ({str(error).splitlines()[0]}); "
                          'install the version that jax names: pip install "jax[tpu]".') from error
