"""One trainer a workdir."""
import json
import os
import socket
import subprocess
import sys

import pytest

from vlm_jax.errors import CheckpointError
from vlm_jax.training import locks
from vlm_jax.training.locks import WorkdirLock


def test_second_trainer_is_refused_and_the_lock_goes_away(tmp_path):
    with WorkdirLock(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / "train.lock").read_text())
        assert holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on .* training here since .*another --workdir") as error, \
                WorkdirLock(tmp_path / "run"):
            pytest.fail("two trainers")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "train.lock").exists()
    with WorkdirLock(tmp_path / "run"):
        pass


CHILD = """
import sys
from vlm_jax.training.locks import WorkdirLock
with WorkdirLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_lock_dies_with_a_killed_process(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match=f"process {child.pid}"), WorkdirLock(tmp_path):
            pytest.fail("two trainers")
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert (tmp_path / "train.lock").exists()
    with WorkdirLock(tmp_path):
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()


def test_a_lock_kept_open_by_an_orphan_is_taken_over(tmp_path, monkeypatch):
    orphan = WorkdirLock(tmp_path)
    with orphan:
        monkeypatch.setattr(locks, "_gone", lambda holder: True)
        with WorkdirLock(tmp_path):
            assert (tmp_path / "train.lock").exists()
    assert not (tmp_path / "train.lock").exists()


def test_object_stores_use_a_renewed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "is_remote", lambda path: True)
    path = tmp_path / "train.lock"
    with WorkdirLock(tmp_path), pytest.raises(CheckpointError, match="training here"), WorkdirLock(tmp_path):
        pytest.fail("two trainers")
    assert not path.exists()
    elsewhere = {"host": "another", "pid": 1, "renewed": __import__("time").time(), "started": "today"}
    path.write_text(json.dumps(elsewhere))
    with pytest.raises(CheckpointError, match="process 1 on another has been training here since today"), WorkdirLock(tmp_path):
        pytest.fail("two trainers")
    for stale in ({**elsewhere, "renewed": 0}, {**elsewhere, "host": socket.gethostname(), "process_start": "never"}, "broken"):
        path.write_text(json.dumps(stale))
        with WorkdirLock(tmp_path):
            pass


def test_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written.*choose another --workdir"), WorkdirLock(tmp_path / "file" / "run"):
        pytest.fail("locked a file")
