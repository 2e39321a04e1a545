"""The loop: bit-identical runs, also across an interruption; the same losses on other meshes; guards that stop it with one clear message."""
import errno
import json
import shutil

import jax
import numpy as np
import pytest

from vlm_jax import faults
from vlm_jax.errors import CheckpointError, ConfigError, DataError, DivergedError
from vlm_jax.settings import plain
from vlm_jax.training import loop, setup
from vlm_jax.training.checkpoints import restore_parameters
from vlm_jax.training.config import load_config, merge, resolve
from vlm_jax.training.loop import train


def shapes(steps=4, **overrides):
    """The shapes config's test variant as plain dicts, without evaluations, saving every second step."""
    config = plain(load_config("configs/siglip/shapes.py:variant=test"))
    config.update(evaluations={}, log_every=1, checkpoint=dict(every=2, keep=3), mesh=dict(data=1))
    config["stages"][0]["steps"] = steps
    return merge(config, overrides)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def leaves(workdir, step=None):
    params, _ = restore_parameters(workdir, step)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of four steps on one device."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(shapes(), workdir, devices=jax.devices()[:1])
    return workdir


def test_same_seed_twice_is_bit_identical(finished, tmp_path):
    train(shapes(), tmp_path / "run", devices=jax.devices()[:1])
    assert losses(tmp_path / "run") == losses(finished)
    for a, b in zip(leaves(tmp_path / "run"), leaves(finished), strict=True):
        np.testing.assert_array_equal(a, b)


def test_interrupted_run_ends_bit_identical(finished, tmp_path):
    """The newest checkpoint and the metrics after step 2 vanish, as after a kill; the same command ends where the undisturbed run ended."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "4")
    train(shapes(), run, devices=jax.devices()[:1])
    assert losses(run) == losses(finished)
    for a, b in zip(leaves(run), leaves(finished), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_is_another_run(finished, tmp_path):
    train(shapes(steps=2, seed=1), tmp_path / "run", devices=jax.devices()[:1])
    assert losses(tmp_path / "run")[2] != losses(finished)[2]


@pytest.mark.parametrize("mesh", [dict(data=4), dict(fsdp=4), dict(data=2, fsdp=2)], ids=str)
def test_other_meshes_give_the_same_losses(finished, tmp_path, mesh):
    with jax.default_matmul_precision("highest"):
        train(shapes(mesh=mesh), tmp_path / "run", devices=jax.devices()[:4])
    ours, expected = losses(tmp_path / "run"), losses(finished)
    np.testing.assert_allclose([ours[s] for s in expected], list(expected.values()), rtol=1e-5)


def test_fsdp_shards_parameters_and_their_moments():
    config = resolve(shapes(mesh=dict(data=1, fsdp=4)))
    parts = setup.build(config, 0, setup.read(config), jax.devices()[:4])
    sharded = [leaf for leaf in jax.tree.leaves(parts.abstract_state) if leaf.sharding.shard_shape(leaf.shape) != leaf.shape]
    largest = max(jax.tree.leaves(parts.abstract_state["params"]), key=lambda leaf: leaf.size)
    assert largest.sharding.shard_shape(largest.shape) != largest.shape
    assert len(sharded) >= 3   # the parameter and its two moments


def test_damaged_newest_checkpoint_is_passed_over(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for file in (run / "checkpoints" / "4").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(bytes(data))
    train(shapes(), run, devices=jax.devices()[:1])
    assert "warning" in capsys.readouterr().out
    for a, b in zip(leaves(run), leaves(finished), strict=True):
        np.testing.assert_array_equal(a, b)


def test_longer_run_goes_on(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    summary = train(shapes(steps=6), run, devices=jax.devices()[:1])
    assert summary["step"] == 6 and sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def test_other_model_in_the_workdir_is_refused(finished):
    with pytest.raises(CheckpointError, match=r"model differ.*choose another --workdir(.|\n)*- model.image.depth: 2\n.*\+ model.image.depth: 3"):
        train(shapes(model=dict(image=dict(depth=3))), finished)


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        train(shapes(), tmp_path / "file" / "run")


def test_nan_stops_with_step_and_batch(tmp_path):
    config = shapes(steps=3)
    config["stages"][0]["schedule"] = dict(name="constant", peak=float("1e38"))
    config["stages"][0]["clip"] = None
    with pytest.raises(DivergedError, match=r"step [23]: .*diverged.json"):
        train(config, tmp_path / "run", devices=jax.devices()[:1])
    [event] = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert event["kind"] == "nonfinite" and event["action"] == "stop" and len(event["example_id"]["pairs"]) == 8


def table_source(folder, rows):
    from PIL import Image
    for i in range(8):
        Image.new("RGB", (30, 20), (10 * i, 0, 200)).save(folder / f"{i}.png")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return dict(name="table", path=str(folder / "pairs.jsonl"), images=str(folder))


def test_bad_records_are_skipped_and_counted_or_stop_the_run(tmp_path, capsys):
    rows = [dict(image=f"{i}.png", caption=f"picture {i}") for i in range(8)] + [dict(image="gone.png", caption="x"), dict(image="1.png", caption=3)]
    source = table_source(tmp_path, rows)
    config = shapes(steps=2)
    config["stages"][0]["data"]["pairs"].update(source=source, bad_budget=0.5)
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert "skipped bad records" in capsys.readouterr().out
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()
    config["stages"][0]["data"]["pairs"].update(on_bad="raise")
    with pytest.raises(DataError, match="pairs.jsonl"):
        train(config, tmp_path / "run2", devices=jax.devices()[:1])


def test_a_batch_that_does_not_divide_trains_as_on_one_device(tmp_path):
    train(shapes(), tmp_path / "one", devices=jax.devices()[:1])
    train(shapes(mesh=dict(data=3)), tmp_path / "three", devices=jax.devices()[:3])
    one, three = losses(tmp_path / "one"), losses(tmp_path / "three")
    assert len(one) > 1 and three == pytest.approx(one, rel=1e-4)


def test_picture_size_that_the_model_does_not_take_is_refused(tmp_path):
    config = shapes()
    config["processor"]["image"] = [["decode", {}], ["resize", {"size": 20}], ["value_range", {"low": -1, "high": 1}]]
    with pytest.raises(ConfigError, match=r"20, 20.*24, 24"):
        train(config, tmp_path / "run", devices=jax.devices()[:1])


def test_moving_average_is_kept_and_preferred(tmp_path):
    config = shapes(steps=2)
    config["stages"][0]["ema"] = dict(decay=0.5)
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    averaged = leaves(tmp_path / "run")
    raw, _ = restore_parameters(tmp_path / "run", which="params")
    assert any((a != np.asarray(b)).any() for a, b in zip(averaged, jax.tree.leaves(raw)))


def test_locked_image_tower_stays_bit_identical_across_stages(tmp_path):
    lit = plain(load_config("configs/lit/emoji.py:variant=test"))["stages"][1]
    config = shapes(steps=2)
    config["stages"].append(dict(config["stages"][0], train=lit["train"], init_from=lit["init_from"]))
    summary = train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert summary["step"] == 4
    before, _ = restore_parameters(tmp_path / "run", 2)
    after, _ = restore_parameters(tmp_path / "run", 4)
    for a, b in zip(jax.tree.leaves(before["image"]), jax.tree.leaves(after["image"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(jax.tree.leaves(before["text"]), jax.tree.leaves(after["text"])))


def test_gradient_caching_equals_the_large_batch(finished, tmp_path):
    config = shapes()
    config["stages"][0]["accumulate"] = dict(micro_batches=4, cached=True)
    with jax.default_matmul_precision("highest"):
        train(config, tmp_path / "run", devices=jax.devices()[:1])
    np.testing.assert_allclose(list(losses(tmp_path / "run").values()), list(losses(finished).values()), rtol=2e-6)


def test_a_full_disk_costs_neither_a_step_nor_a_row(finished, tmp_path, monkeypatch, capsys):
    """A save fails before its commit, another before it begins, a row, an evaluation's files and the report cannot be written: the run ends as it should."""
    plan = "checkpoint.before_commit:1=full,metrics.write:2=full,checkpoint.save:3=full,evaluation.write:1=full"
    monkeypatch.setattr(faults, "_plan", faults._read(plan))
    faults._counts.clear()

    def full(workdir):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(loop, "write_report", full)
    evaluations = {"search": dict(evaluator="retrieval", source=dict(name="shapes", split="heldout_pairs", size=32, limit=6))}
    summary = train(shapes(evaluations=evaluations), tmp_path / "run", devices=jax.devices()[:1])
    said = capsys.readouterr()
    assert said.err.count("the next save tries again") == 2 and "files of the evaluation cannot be written" in said.out and summary["report"] is None
    assert losses(tmp_path / "run") == losses(finished) and summary["evaluations"]["search"]["pictures"] == 6
    for a, b in zip(leaves(tmp_path / "run"), leaves(finished), strict=True):
        np.testing.assert_array_equal(a, b)
