"""Files that grow, locally and on a stand-in for an object store."""
from vlm_jax.training import append_file
from vlm_jax.training.append_file import AppendFile, is_remote


def test_local_bytes_are_there_at_once(tmp_path):
    file = AppendFile(tmp_path / "deep" / "f", keep=b"a")
    file.write(b"b")
    assert (tmp_path / "deep" / "f").read_bytes() == b"ab"
    file.close()
    file.close()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f"]


def test_remote_file_is_rewritten_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(append_file, "is_remote", lambda path: True)
    path = tmp_path / "bucket" / "f"
    file = AppendFile(path, keep=b"a")
    file.write(b"b")
    assert path.read_bytes() == b"a"        # the interval is not over
    monkeypatch.setattr(append_file, "_REWRITE_SECONDS", 0.0)
    file.write(b"c")
    assert path.read_bytes() == b"abc"
    file.close()
    assert path.read_bytes() == b"abc"


def test_remote_paths():
    assert is_remote("gs://bucket/run") and not is_remote("/tmp/run")
