"""Which steps stay, and deletions killed at every sub-step."""
import json
import logging
import shutil

import jax.numpy as jnp
import pytest

from tests.training.test_checkpoints import make_tree
from vlm_jax import faults
from vlm_jax.errors import CheckpointError
from vlm_jax.training import checkpoint_keeper
from vlm_jax.training.checkpoint_policy import kept, last_good
from vlm_jax.training.checkpoints import Checkpoints, DamagedCheckpoint

HOUR = 3600.0


@pytest.mark.parametrize("policy, stay", [
    ((1,), {60}), ((3,), {40, 50, 60}), ((1, 20), {20, 40, 60}), ((1, 25), {50, 60}), ((2, None, 2.0), {10, 30, 50, 60}), ((1, 30, 2.5), {10, 30, 40, 60}),
    ((9,), {10, 20, 30, 40, 50, 60}), ((1, None, 100), {10, 60}),
])
def test_kept(policy, stay):
    assert kept({step: step / 10 * HOUR for step in range(10, 70, 10)}, *policy) == stay


def test_what_is_kept_stays_kept_as_the_run_goes_on():
    saved_at, present = {}, set()
    for step in range(0, 400, 7):
        saved_at[step] = step * 600.0 - (50 * HOUR if 100 < step < 200 else 0)      # a clock that jumps back and forth
        present = kept({s: saved_at[s] for s in {*present, step}}, 2, 49, 5.0)
        assert step in present
    assert set(range(0, 400, 49)) <= present
    times = [saved_at[step] for step in sorted(present)]
    assert len(times) > 10 and kept({}, 1) == set()


@pytest.mark.parametrize("settings", [dict(keep=0), dict(keep_every=0), dict(keep_hours=0), dict(keep_hours=-1.0)])
def test_settings_that_cannot_work(tmp_path, settings):
    with pytest.raises(CheckpointError, match=f"checkpoint.{next(iter(settings))} is"):
        Checkpoints(tmp_path, **settings)


def test_saves_keep_what_the_policy_says(tmp_path):
    with Checkpoints(tmp_path / "c", keep=1, keep_every=4) as checkpoints:
        for step in range(1, 10):
            checkpoints.save(step, {"params": {"x": jnp.full(3, step)}})
            checkpoints.wait()
            assert checkpoints.last_good() == step == checkpoints.latest()
    assert checkpoints.steps() == [4, 8, 9]
    assert [path.name for path in sorted((tmp_path / "c").glob("LAST*"))] == ["LAST_GOOD-9.json"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("point", ["checkpoint.before_commit", "checkpoint.after_commit", "checkpoint.pointer", "checkpoint.collect", "checkpoint.collecting",
                                   "checkpoint.collected"])
def test_nothing_half_done_is_ever_a_step(tmp_path, monkeypatch, point):
    """Whatever a death at the point leaves, it opens, is sound, and the next trainer tidies it up."""
    folder, snapshots = tmp_path / "c", []

    def passing(name):
        if name == point:
            snapshots.append(shutil.copytree(folder, tmp_path / f"killed{len(snapshots)}"))
    monkeypatch.setattr(faults, "point", passing)
    with Checkpoints(folder, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_tree(step), {"step": step})
            checkpoints.wait()
    monkeypatch.undo()
    assert len(snapshots) >= 2
    for number, snapshot in enumerate(snapshots):
        reader = Checkpoints(snapshot)
        visible = number if point == "checkpoint.before_commit" else number + 1 if point.startswith("checkpoint.a") or "pointer" in point else number + 2
        if visible:
            tree, metadata = reader.restore(make_tree())
            assert metadata["step"] == visible and float(tree["params"]["scale"]) == visible + 0.5
        with Checkpoints(snapshot, keep=1) as checkpoints:
            checkpoints.save(7, make_tree(7), {"step": 7})
        assert sorted(path.name for path in snapshot.iterdir()) == ["7", "LAST_GOOD-7.json"]


def test_a_step_that_does_not_read_back_is_said_and_keeps_the_older_one(tmp_path, monkeypatch, caplog):
    real = checkpoint_keeper.verify

    def verify(path, stored):
        if path.name == "2":
            for file in (path / "state" / "d").iterdir():
                file.write_bytes(b"rotten")
            for file in (path / "state" / "ocdbt.process_0" / "d").iterdir():
                file.write_bytes(b"rotten")
        real(path, stored)
    monkeypatch.setattr(checkpoint_keeper, "verify", verify)
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, make_tree(1), {"step": 1})
    checkpoints.wait()
    checkpoints.save(2, make_tree(2), {"step": 2})
    with caplog.at_level(logging.ERROR), pytest.raises(DamagedCheckpoint, match="2: does not read back as it was saved .* goes on from step 1"):
        checkpoints.wait()
    assert "does not read back" in caplog.text
    assert checkpoints.last_good() == 1 == checkpoints.latest() and checkpoints.steps() == [1, 2]
    checkpoints.save(3, make_tree(3), {"step": 3})
    checkpoints.close()
    assert Checkpoints(tmp_path / "c").steps() == [3]


def test_a_deletion_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def passing(name):
        if name == "checkpoint.collecting":
            raise OSError(5, "Input/output error")
    monkeypatch.setattr(faults, "point", passing)
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_tree(step))
            checkpoints.wait()
    assert checkpoints.steps() == [2] and (tmp_path / "c" / "1").exists()
    assert "old ones not deleted (" in caplog.text


def test_pointers(tmp_path, caplog):
    folder = tmp_path / "c"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_tree(step), {"step": step})
    path = folder / "LAST_GOOD-2.json"
    checksum = json.loads((folder / "2" / "meta" / "metadata").read_text())["checksum"]
    assert last_good(checkpoints.folder) == (2, json.loads(path.read_text())["checksum"]) and checksum == last_good(checkpoints.folder)[1]
    (folder / "LAST_GOOD-9.json").write_text("{cut")
    assert last_good(checkpoints.folder)[0] == 2
    (folder / "2" / "commit_success.txt").unlink()
    caplog.clear()
    assert Checkpoints(folder).restore(make_tree())[1]["step"] == 1
    assert "the last good checkpoint, step 2, is gone or damaged; going back to step 1" in caplog.text


def test_strict_stops_at_the_first_damage(tmp_path):
    folder = tmp_path / "c"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_tree(step), {"step": step})
    (folder / "2" / "meta" / "metadata").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match="2: meta/metadata cannot be read"):
        Checkpoints(folder).restore(make_tree(), strict=True)
    assert Checkpoints(folder).restore(make_tree())[1]["step"] == 1


def test_a_failed_save_leaves_no_rubbish_behind(tmp_path, monkeypatch):
    """A full disk: the unfinished folder goes before the next save, which needs the room."""
    folder, fail = tmp_path / "c", [True]

    def passing(name):
        if name == "checkpoint.before_commit" and fail:
            fail.clear()
            raise OSError(28, "No space left on device")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, make_tree(1))
    checkpoints.wait()
    monkeypatch.setattr(faults, "point", passing)
    checkpoints.save(2, make_tree(2))
    with pytest.raises(CheckpointError, match="checkpoint 2 could not be saved .*No space left"):
        checkpoints.wait()
    assert (folder / "2.orbax-checkpoint-tmp").exists()
    checkpoints.check()
    checkpoints.save(3, make_tree(3))
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "LAST_GOOD-3.json"]
