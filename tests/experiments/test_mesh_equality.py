"""The study's configs and arithmetic, and a short version of it: tensor-parallel and sequence-split training equal one device; two processes too."""
import math

import jax
import numpy as np
import pytest

from experiments.mesh_equality import run
from vlm_jax.sharding import abstract_mesh, check_replicated, parameter_shardings
from vlm_jax.training.config import resolve


def test_the_runs_cover_what_the_promise_names():
    meshes = [{axis: size for axis, size in one["mesh"].items() if size > 1 or axis == "data"} for one in run.RUNS]
    assert {"data": 8} in meshes and {"data": 1, "fsdp": 8} in meshes and {"data": 2, "fsdp": 2, "tensor": 2} in meshes
    assert any("sequence" in mesh for mesh in meshes) and any("slices" in mesh for mesh in meshes)
    assert {one.get("processes", 1) for one in run.RUNS} == {1, 2, 4} and any(one.get("batch", run.BATCH) % 8 for one in run.RUNS)


@pytest.mark.parametrize("number", range(len(run.RUNS)))
def test_every_run_is_one_that_the_loop_takes(number):
    config = resolve(run.config_of(run.RUNS[number], steps=3, seed=4))
    assert config["seed"] == 4 and config["log_every"] == 1 and not config["evaluations"]
    assert config["stages"][0]["steps"] == 3 and config["stages"][0]["data"]["pairs"]["batch_size"] in (run.BATCH, run.UNEVEN)
    devices = math.prod(size for axis, size in run.RUNS[number]["mesh"].items() if axis != "slices")
    assert abstract_mesh(f"cpu-{devices}", config["mesh"]).size == devices and devices in (4, 8)


@pytest.fixture(scope="module")
def one_device():
    with jax.default_matmul_precision("highest"):
        return run.measure(run.config_of(dict(run.ONE, batch=run.UNEVEN), steps=3), jax.devices()[:1])


@pytest.mark.parametrize("mesh, layout, train", [
    (dict(data=2, fsdp=2, tensor=2), "fsdp_tensor", True),     # 14 rows do not divide by four
    (dict(data=1, sequence=4), "replicated", False),
    pytest.param(dict(data=2, tensor=4), "tensor", False, marks=pytest.mark.slow),     # two heads do not divide by four
])
def test_loss_and_gradient_equal_one_device(one_device, mesh, layout, train):
    one = dict(mesh=mesh, layout=layout, batch=run.UNEVEN)
    with jax.default_matmul_precision("highest"):
        losses, gradients = run.measure(run.config_of(one, steps=3), jax.devices()[:math.prod(mesh.values())], train)
    expected, expected_gradients = one_device
    assert run.largest_difference(expected[:len(losses)], losses) <= run.BAR
    assert run.gradient_difference(expected_gradients, gradients) <= run.BAR
    assert max(np.abs(leaf).max() for leaf in gradients.values()) > 1e-3


def test_the_layout_splits_the_study_model():
    shapes = {"blocks": {"attention": {"query": {"kernel": jax.ShapeDtypeStruct((2, 64, 2, 32), np.float32)}}}}
    mesh = abstract_mesh("cpu-8", dict(data=2, fsdp=2, tensor=2))
    shardings = parameter_shardings(mesh, shapes, run.config_of(run.RUNS[3])["sharding"])
    assert shardings["blocks"]["attention"]["query"]["kernel"].spec[2] == "tensor"
    check_replicated(shapes, shardings)


@pytest.mark.slow
def test_two_processes_equal_one_device(one_device):
    losses, gradients = run.run_apart(dict(mesh={"data": 2, "fsdp": 2}, layout="fsdp", batch=run.UNEVEN, processes=2), 3, 0)
    expected, expected_gradients = one_device
    assert run.largest_difference(expected, losses) <= run.BAR and run.gradient_difference(expected_gradients, gradients) <= run.BAR


def test_differences_are_relative():
    assert run.largest_difference([4.0, 2.0], [4.0, 2.002]) == pytest.approx(1e-3)
    with pytest.raises(ValueError):
        run.largest_difference([1.0], [1.0, 2.0])
    one = {"a": np.array([3.0, 4.0]), "noise": np.array([1e-9])}
    assert run.gradient_difference(one, {"a": np.array([3.0, 4.005]), "noise": np.array([2e-9])}) == pytest.approx(1e-3)
