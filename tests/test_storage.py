"""Small files on a local disk; object stores: tests/training/test_checkpoint_remote.py."""
import os
import socket
import subprocess
import sys

from vlm_jax import storage


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    left = tmp_path / f"metrics.json.{host}-{ended.pid}.tmp"
    kept = [tmp_path / f"metrics.json.{host}-{os.getppid()}.tmp", tmp_path / f"metrics.json.elsewhere-{ended.pid}.tmp",
            tmp_path / f"other.json.{host}-{ended.pid}.tmp"]
    for path in (left, *kept):
        path.write_text("half")
    storage.write_whole(tmp_path / "metrics.json", b"whole")
    assert (tmp_path / "metrics.json").read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "metrics.json", *kept])


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    storage.write_whole(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    try:
        storage.write_whole(path, b"new")
    except OSError:
        pass
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"] and path.read_bytes() == b"old"
