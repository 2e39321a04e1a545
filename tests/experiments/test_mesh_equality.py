"""The study's config and arithmetic; the runs themselves are the study's."""
import json
import math

import pytest

from experiments.mesh_equality import run


def test_every_mesh_splits_the_batch():
    assert {math.prod(mesh.values()) for mesh in run.MESHES} == {1, 2, 4, 8} and run.MESHES[0] == run.ONE
    assert all(run.BATCH % math.prod(mesh.values()) == 0 for mesh in run.MESHES)


def test_the_config_is_one_that_the_loop_takes():
    from vlm_jax.training.config import resolve
    config = resolve(run.config_of({"data": 2, "fsdp": 2}, steps=3, seed=4))
    assert config["mesh"]["fsdp"] == 2 and config["seed"] == 4 and config["log_every"] == 1 and not config["evaluations"]
    assert config["stages"][0]["steps"] == 3 and config["stages"][0]["data"]["pairs"]["batch_size"] == run.BATCH


def test_losses_are_read_by_step_and_compared(tmp_path):
    rows = [{"step": 2, "kind": "train", "loss": 3.0}, {"step": 1, "kind": "train", "loss": 4.0}, {"step": 2, "kind": "eval", "r1": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.losses(tmp_path) == [4.0, 3.0]
    assert run.largest_difference([4.0, 2.0], [4.0, 2.002]) == pytest.approx(1e-3)
    with pytest.raises(ValueError):
        run.largest_difference([1.0], [1.0, 2.0])
