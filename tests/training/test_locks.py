"""One trainer a workdir."""
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from vlm_jax import storage
from vlm_jax.errors import CheckpointError
from vlm_jax.training import locks, remote_lock
from vlm_jax.training.locks import WorkdirLock
from vlm_jax.training.remote_lock import RemoteLock


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


def test_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written.*choose another --workdir"), WorkdirLock(tmp_path / "file" / "run"):
        pytest.fail("locked a file")


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(remote_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(remote_lock, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(remote_lock, "STALE_SECONDS", 1.0)


def remote(host, path="gs://bucket/run/train.lock"):
    return RemoteLock(path, {"host": host, "pid": 1}, lambda holder: False, lambda holder: CheckpointError(f"held by {holder['host']}"))


def test_object_stores_second_trainer_is_refused(bucket, fast):
    with WorkdirLock("gs://bucket/run") as lock:
        assert list(bucket.objects) == ["bucket/run/train.lock.1"]
        with pytest.raises(CheckpointError, match="training here since .*another --workdir"), WorkdirLock("gs://bucket/run"):
            pytest.fail("two trainers")
        lock.check()
    with WorkdirLock("gs://bucket/run"):
        assert list(bucket.objects) == ["bucket/run/train.lock.2"]     # a number is used once


def test_another_machine_sees_that_the_lock_is_renewed(bucket, fast):
    first = remote("a")
    first.acquire()
    with pytest.raises(CheckpointError, match="held by a"):
        remote("b").acquire()
    first.check()
    first.release()
    second = remote("b")
    second.acquire()
    second.release()


@pytest.mark.parametrize("fail_every", [None, 5])
def test_of_many_exactly_one_takes_a_stale_lock_over(bucket, fast, monkeypatch, fail_every):
    # Six poll together, so that every fifth request can be the same rival's five times running: let it ask more often.
    monkeypatch.setattr(storage, "ATTEMPTS", 12)
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.002)
    dead = remote("dead")
    dead.acquire()
    dead._stop.set()        # as a killed process: no more beats
    dead._thread.join()
    bucket.fail_every = fail_every
    rivals = [remote(f"rival{n}") for n in range(6)]
    outcomes = []

    def try_it(lock):
        try:
            lock.acquire()
            outcomes.append(lock)
        except CheckpointError as error:
            outcomes.append(str(error))
    threads = [threading.Thread(target=try_it, args=(lock,)) for lock in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    bucket.fail_every = None
    winners = [outcome for outcome in outcomes if isinstance(outcome, RemoteLock)]
    assert len(outcomes) == 6 and len(winners) == 1
    assert all(outcome == f"held by {winners[0]._me['host']}" for outcome in outcomes if outcome not in winners)
    dead._renewed_at = 0.0      # it was only stopped, and wakes up
    with pytest.raises(CheckpointError, match="lost the workdir: another trainer took it over"):
        dead.check()
    winners[0].check()
    winners[0].release()


def test_one_who_slept_between_looking_and_making_does_not_win(bucket, fast, monkeypatch):
    """It looked when 1 was released; by the time it makes 2, that number was used, released and tidied away, and 3 holds."""
    first = remote("first")
    first.acquire()
    first.release()
    sleeper = remote("sleeper")
    second, third = remote("second"), remote("third")
    take = RemoteLock._take

    def slow(self, number):
        if self is sleeper and number == 2:
            for lock in (second, third):
                lock.acquire()
                if lock is second:
                    lock.release()
        return take(self, number)
    monkeypatch.setattr(RemoteLock, "_take", slow)
    with pytest.raises(CheckpointError, match="held by third"):
        sleeper.acquire()
    assert list(bucket.objects) == ["bucket/run/train.lock.3"]
    third.check()
    third.release()


def test_a_lock_that_cannot_be_renewed_is_lost_in_the_end(bucket, fast, monkeypatch):
    lock = remote("a")
    lock.acquire()
    lock._stop.set()
    lock._thread.join()
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    bucket.fail_every = 1
    lock._renewed_at -= 0.5
    lock.check()        # an outage shorter than that which makes it stale
    lock._renewed_at -= 1.0
    with pytest.raises(CheckpointError, match="could not be renewed"):
        lock.check()
