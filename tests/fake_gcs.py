"""A stand-in for Google Cloud Storage on loopback: whole objects, create-if-absent by generation, lists by prefix; no rename, no append, no locks.

TensorStore speaks to it over HTTP as it does to the real one (`TENSORSTORE_GCS_HTTP_URL`), epath through an fsspec file system registered for gs://. Every
request can fail: `server.fail_every = 7` answers every seventh with 503 before or after it took effect, by turns.
"""
import http.client
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import io
import itertools
import json
import os
import threading
from urllib.parse import parse_qs, quote, unquote, urlsplit

from etils.epath import backend
import fsspec
from fsspec.spec import AbstractFileSystem
import pytest

from vlm_jax import storage


class FakeGcs(ThreadingHTTPServer):
    """The server; `with FakeGcs() as server:` runs it. `objects` is {"bucket/name": (bytes, generation)}."""
    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.fail_every: int | None = None
        self.requests = self.failures = 0
        self.log: list[tuple[str, str]] = []
        self.sent = 0       # bytes of all answers

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True      # headers and body are two small packets, and the second would wait 40 ms for an answer to the first
    server: FakeGcs

    def log_message(self, *_):
        pass

    def do_GET(self):
        bucket, name, query = self._target()
        if name is None:
            self._answer(200, self._list(bucket, query))
            return
        found = self._find(bucket, name)
        if found is None:
            self._answer(404, {"error": {"code": 404, "message": "not found"}})
        elif query.get("alt") != "media":
            self._answer(200, {"name": name, "size": str(len(found[0])), "generation": str(found[1])})
        elif query.get("ifGenerationNotMatch") == str(found[1]):
            self._answer(304, b"")
        else:
            first, last = 0, len(found[0])
            if ranged := self.headers.get("Range"):
                first, _, end = ranged.removeprefix("bytes=").partition("-")
                first, last = (len(found[0]) - int(end), last) if not first else (int(first), min(last, int(end) + 1) if end else last)
                if first >= len(found[0]):
                    self._answer(416, {})
                    return
            extra = {"Content-Range": f"bytes {first}-{last - 1}/{len(found[0])}"} if ranged else {}
            self._answer(206 if ranged else 200, found[0][first:last], {**extra, "x-goog-generation": str(found[1])})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, _, query = self._target()
        name = query["name"]

        def put():
            with self.server.lock:
                old = self.server.objects.get(f"{bucket}/{name}")
                wanted = query.get("ifGenerationMatch")
                if wanted is not None and wanted != str(old[1] if old else 0):
                    return 412, {"error": {"code": 412, "message": "precondition failed"}}
                generation = next(self.server.generations)
                self.server.objects[f"{bucket}/{name}"] = (body, generation)
                return 200, {"name": name, "size": str(len(body)), "generation": str(generation), "timeCreated": "2026-01-01T00:00:00Z"}
        self._change(put)

    def do_DELETE(self):
        bucket, name, query = self._target()

        def delete():
            with self.server.lock:
                old = self.server.objects.get(f"{bucket}/{name}")
                wanted = query.get("ifGenerationMatch")
                if old is None:
                    return 404, {"error": {"code": 404, "message": "not found"}}
                if wanted is not None and wanted != str(old[1]):
                    return 412, {}
                del self.server.objects[f"{bucket}/{name}"]
                return 204, b""
        self._change(delete)

    def _target(self):
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        _, _, rest = parts.path.partition("/b/")
        bucket, _, name = rest.partition("/o")
        self.server.log.append((self.command, unquote(self.path)))
        return bucket, unquote(name[1:]) if name.startswith("/") and len(name) > 1 else None, query

    def _find(self, bucket, name):
        with self.server.lock:
            return self.server.objects.get(f"{bucket}/{name}")

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.server.lock:
            for key, (content, generation) in sorted(self.server.objects.items()):
                place, _, name = key.partition("/")
                if place != bucket or not name.startswith(prefix):
                    continue
                rest = name[len(prefix):]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append({"name": name, "size": str(len(content)), "generation": str(generation)})
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _fails(self) -> bool:
        with self.server.lock:
            self.server.requests += 1
            fails = bool(self.server.fail_every) and self.server.requests % self.server.fail_every == 0
            self.server.failures += fails
        return fails

    def _change(self, apply):
        fails = self._fails()
        if not fails or self.server.failures % 2:
            status, content = apply()       # an answer that is lost: done, and the client does not know
        if fails:
            self._send(503, b"{}")
        else:
            self._send(status, content)

    def _answer(self, status, content, headers=()):
        if self._fails():
            self._send(503, b"{}")
        else:
            self._send(status, content, headers)

    def _send(self, status, content, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        with self.server.lock:
            self.server.sent += len(body)
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class FakeGcsFileSystem(AbstractFileSystem):
    """What gcsfs is to epath, for the server at `url`. Folders are only prefixes; renaming raises."""
    protocol = ("gs", "gcs")
    root_marker = ""
    cachable = False
    url = ""        # set by the fixture

    def _request(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        try:
            connection.request(method, path, body=body, headers=dict(headers))
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status == 404:
            raise FileNotFoundError(path)
        if response.status == 412:
            raise FileExistsError(path)
        if response.status >= 400:
            raise OSError(f"HTTP {response.status}: {path}")
        return content

    def _object(self, path):
        bucket, _, name = self._strip_protocol(path).partition("/")
        return f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path).rstrip("/")
        bucket, _, name = path.partition("/")
        found = json.loads(self._request("GET", f"/storage/v1/b/{bucket}/o?delimiter=/&prefix={quote(name + '/' if name else '', safe='')}"))
        entries = [{"name": f"{bucket}/{item['name']}", "size": int(item["size"]), "type": "file", "generation": item["generation"]} for item in found["items"]]
        entries += [{"name": f"{bucket}/{prefix.rstrip('/')}", "size": 0, "type": "directory"} for prefix in found["prefixes"]]
        if not entries:
            raise FileNotFoundError(path)
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path, **_):
        path = self._strip_protocol(path).rstrip("/")
        if "/" not in path:
            return {"name": path, "size": 0, "type": "directory"}
        try:
            found = json.loads(self._request("GET", self._object(path)))
            return {"name": path, "size": int(found["size"]), "type": "file"}
        except FileNotFoundError:
            self.ls(path)
            return {"name": path, "size": 0, "type": "directory"}

    def exists(self, path, **_):
        try:
            self.info(path)
            return True
        except FileNotFoundError:
            return False

    def cat_file(self, path, start=None, end=None, **_):
        ranged = {} if start is None and end is None else {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}"}
        return self._request("GET", self._object(path) + "?alt=media", headers=ranged)

    def pipe_file(self, path, value, mode="overwrite", **_):
        bucket, _, name = self._strip_protocol(path).partition("/")
        condition = "&ifGenerationMatch=0" if mode == "create" else ""
        self._request("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}{condition}", body=bytes(value))

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        if mode != "wb":
            raise OSError(f"an object store cannot open with mode {mode}")
        return _Upload(self, path)

    def rm_file(self, path):
        self._request("DELETE", self._object(path))

    _rm = rm_file

    def rm(self, path, recursive=False, maxdepth=None):
        if not recursive:
            self.rm_file(path)
            return
        for name in self.find(path):
            try:
                self.rm_file(name)
            except FileNotFoundError:
                pass

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def mv(self, *_, **__):
        raise OSError("an object store cannot rename")

    mv_file = rename = move = mv


class _Upload(io.BytesIO):
    def __init__(self, system, path):
        super().__init__()
        self._system, self._path = system, path

    def close(self):
        if not self.closed:
            self._system.pipe_file(self._path, self.getvalue())
        super().close()


# TensorStore reads its environment once a process, so the server lives as long as the process and is emptied between tests.
_server: FakeGcs | None = None


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket/... is this store on loopback, for epath, fsspec and TensorStore alike; a conftest that imports the fixture offers it."""
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
    _server.sent = 0
    _server.fail_every = None
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    yield _server
    _server.fail_every = None
