"""The fixture `bucket`: gs://bucket/... is a fake object store on loopback, for epath, fsspec and TensorStore alike."""
import os

from etils.epath import backend
import fsspec
import pytest

from tests.fake_gcs import FakeGcs, FakeGcsFileSystem
from vlm_jax import storage

# TensorStore reads its environment once a process, so the server lives as long as the process and is emptied between tests.
_server: FakeGcs | None = None


@pytest.fixture
def bucket(monkeypatch):
    global _server
    if _server is None:
        _server = FakeGcs().__enter__()
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = _server.url
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        FakeGcsFileSystem.url = _server.url
        for name in ("gs", "gcs"):
            fsspec.register_implementation(name, FakeGcsFileSystem, clobber=True)
    _server.objects.clear()
    _server.log.clear()
    _server.fail_every = None
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    yield _server
    _server.fail_every = None
