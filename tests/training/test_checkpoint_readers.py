"""Evaluation and notebooks read while a trainer saves and deletes (fault catalogue R17), in threads and in another process."""
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import CheckpointError
from vlm_jax.training import checkpoint_arrays, checkpoints as checkpoints_module
from vlm_jax.training.checkpoint_policy import delete_step
from vlm_jax.training.checkpoints import Checkpoints, restore_parameters

READER = """
import sys
import numpy as np
from vlm_jax.training.checkpoints import Checkpoints, restore_parameters
seen = []
print("reading", flush=True)
while not seen or seen[-1] < int(sys.argv[2]):
    params, step = restore_parameters(sys.argv[1], wait_seconds=60)
    assert (params["x"] == step).all() and params["x"].shape == (40, 50), step
    tree, metadata = Checkpoints(sys.argv[1] + "/checkpoints").restore({"params": {"x": np.zeros((40, 50), np.float32)}})
    assert (np.asarray(tree["params"]["x"]) == metadata["step"]).all()
    assert not seen or step >= seen[-1], (step, seen)
    seen.append(step)
print(len(seen))
"""


def test_another_process_reads_while_the_trainer_saves_and_collects(tmp_path):
    last = 30
    reader = subprocess.Popen([sys.executable, "-c", READER, str(tmp_path), str(last)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert reader.stdout.readline() == "reading\n"
        with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
            for step in range(1, last + 1):
                checkpoints.save(step, {"params": {"x": jnp.full((40, 50), step, jnp.float32)}}, {"step": step})
        output, errors = reader.communicate(timeout=120)
    finally:
        reader.kill()
        reader.wait()
    assert reader.returncode == 0, errors
    assert int(output) >= 1
    assert "damaged" not in errors


def test_threads_read_while_the_trainer_saves_and_collects(tmp_path):
    stop, failures, read = threading.Event(), [], []

    def look():
        while not stop.is_set():
            try:
                params, step = restore_parameters(tmp_path, wait_seconds=30)
                assert (params["x"] == step).all()
                read.append(step)
            except BaseException as error:
                failures.append(error)
                return
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        for step in range(1, 16):
            checkpoints.save(step, {"params": {"x": jnp.full(500, step, jnp.float32)}})
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failures and read


def test_a_step_deleted_under_the_reader_is_not_damage(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": {"x": jnp.full(5, step, jnp.float32)}})
    real, deleted = checkpoint_arrays.read_on_host, []

    def read(path, stored):
        if not deleted:
            deleted.append(path.name)
            delete_step(checkpoints.folder, 2)
        return real(path, stored)
    monkeypatch.setattr(checkpoints_module, "read_on_host", read)
    params, step = restore_parameters(tmp_path)
    assert deleted == ["2"] and step == 1 and (params["x"] == 1).all()
    assert "deleted while it was read" in caplog.text and "damaged (" not in caplog.text
    deleted.clear()
    with pytest.raises(CheckpointError, match="there is no checkpoint of step 2; there are: 1"):
        restore_parameters(tmp_path, step=2)


def test_waits_for_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "_POLL_SECONDS", 0.01)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        restore_parameters(tmp_path, wait_seconds=0.05)
    found = []
    reader = threading.Thread(target=lambda: found.append(restore_parameters(tmp_path, wait_seconds=60)))
    reader.start()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": {"x": jnp.ones(2)}})
    reader.join(60)
    np.testing.assert_array_equal(found[0][0]["x"], np.ones(2))
