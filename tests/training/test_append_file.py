"""Files that grow, locally and on a stand-in for an object store."""
import pytest

from vlm_jax.storage import is_remote
from vlm_jax.training import append_file
from vlm_jax.training.append_file import AppendFile


def test_local_bytes_are_there_at_once(tmp_path):
    file = AppendFile(tmp_path / "deep" / "f", keep=b"a")
    file.write(b"b")
    assert (tmp_path / "deep" / "f").read_bytes() == b"ab"
    file.close()
    file.close()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f"]


def test_remote_file_is_rewritten_now_and_then(bucket, monkeypatch):
    def there():
        return bucket.objects["bucket/run/f"][0]
    file = AppendFile("gs://bucket/run/f", keep=b"a")
    file.write(b"b")
    assert there() == b"a"        # the interval is not over
    monkeypatch.setattr(append_file, "_REWRITE_SECONDS", 0.0)
    file.write(b"c")
    assert there() == b"abc"
    file.close()
    assert there() == b"abc"


def test_a_store_that_does_not_answer_loses_nothing(bucket, monkeypatch, caplog):
    monkeypatch.setattr(append_file, "_REWRITE_SECONDS", 0.0)
    file = AppendFile("gs://bucket/run/f")
    bucket.fail_every = 1
    file.write(b"a")
    assert "could not be written" in caplog.text
    with pytest.raises(OSError, match="503"):
        file.flush()
    bucket.fail_every = None
    file.write(b"b")
    assert bucket.objects["bucket/run/f"][0] == b"ab"


def test_remote_paths():
    assert is_remote("gs://bucket/run") and not is_remote("/tmp/run")
