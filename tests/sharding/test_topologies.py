"""Names of topologies, the table of chips, and libtpu's own description of slices that are not there (in a child: it may abort)."""
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.sharding.topologies import CHIPS, chip_of, parse_topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install vlm_jax[test] has it)")


@pytest.mark.parametrize("name, chip, shape, slices, devices", [
    ("v5e-256", "v5e", (16, 16), 1, 256), ("v5e:16x16", "v5e", (16, 16), 1, 256), ("v5e:16x16*4", "v5e", (16, 16), 4, 1024),
    ("v5p-128", "v5p", (4, 4, 4), 1, 64), ("v5p:8x8x16", "v5p", (8, 8, 16), 1, 1024), ("v4-8", "v4", (2, 2, 1), 1, 4), ("v6e-8", "v6e", (2, 4), 1, 8),
    ("v5p:4x8x12", "v5p", (4, 8, 12), 1, 384), ("V5E-1", "v5e", (1, 1), 1, 1), ("h100-8", "h100", (8,), 1, 8), ("h100-8*2", "h100", (8,), 2, 16),
    ("cpu-8", "cpu", (8,), 1, 8)])
def test_names(name, chip, shape, slices, devices):
    topology = parse_topology(name)
    assert (topology.chip.name, topology.shape, topology.slices, topology.size) == (chip, shape, slices, devices)
    assert topology.devices_per_slice * slices == devices


@pytest.mark.parametrize("name, says", [
    ("v5x-8", "Did you mean"), ("v5e-3", "made with 1, 4, 8"), ("v5p-4", "TensorCores"), ("v5e:3x5", "no slice of v5e"), ("v5p:4x4", "no slice of v5p"),
    ("v5p:6x8x8", "multiples of 4"), ("", "CHIP-NUMBER"), ("v5e", "CHIP-NUMBER"), ("v5e-8*0", "slices"), ("cpu-0", "no device")])
def test_names_that_are_none(name, says):
    with pytest.raises(ConfigError, match=says):
        parse_topology(name)


def test_local_and_simulated_devices():
    assert parse_topology("local").devices == jax.devices()
    assert parse_topology("cpu-4").devices == jax.devices()[:4]
    with pytest.raises(ConfigError, match="device_count=64"):
        list(parse_topology("cpu-64").devices)
    with pytest.raises(ConfigError, match="only TPUs are described"):
        list(parse_topology("h100-8").devices)


def test_kinds_find_their_row():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v4": "v4", "TPU v4 lite": "v4i", "TPU v6 lite": "v6e",
             "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "cpu": "cpu"}
    assert {kind: chip_of(SimpleNamespace(device_kind=kind)).name for kind in kinds} == kinds
    assert chip_of(SimpleNamespace(device_kind="Abacus 3000")) is None


def test_every_row_has_its_source():
    for chip in CHIPS.values():
        assert chip.source and all(hasattr(chip, field) for field in chip.unverified)
        if chip.platform != "cpu":
            assert 1e13 < chip.peak() < 1e16 and 4e9 < chip.memory_bytes < 1e12 and 1e11 < chip.memory_bandwidth < 1e13
    assert CHIPS["v5e"].peak("int8") > CHIPS["v5e"].peak("float16") == CHIPS["v5e"].peak()


@needs_libtpu
def test_libtpu_describes_them():
    """One process describes one slice of each generation, a single chip, and two slices."""
    wanted = {"v4-8": (4, "TPU v4"), "v5e-1": (1, "TPU v5 lite"), "v5e-8": (8, "TPU v5 lite"), "v5p-16": (8, "TPU v5"), "v6e-16": (16, "TPU v6 lite"),
              "v5e:2x2*2": (8, "TPU v5 lite")}
    code = ("import json, sys\nfrom vlm_jax.sharding.topologies import parse_topology\n"
            "found = {name: parse_topology(name).devices for name in json.loads(sys.argv[1])}\n"
            "print(json.dumps({name: [len(devices), devices[0].device_kind] for name, devices in found.items()}))")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(list(wanted))], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {name: list(value) for name, value in wanted.items()}
