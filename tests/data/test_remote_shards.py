"""Webdataset shards on an object store: the records of the local ones, few and small requests, an index that is kept, and errors."""
import io
import os

import numpy as np
from PIL import Image
import pytest

from tests.data.test_tar_shards import pairs, write_shard
from vlm_jax.data import tar_index
from vlm_jax.data.files import RangeReader
from vlm_jax.data.loader import Loader
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import build_source, texts_of
from vlm_jax.data.tar_shards import TarSource
from vlm_jax.errors import DataError


def upload(bucket, name, path):
    with open(path, "rb") as file:
        bucket.objects[f"bucket/{name}"] = (file.read(), next(bucket.generations))


@pytest.fixture
def shards(bucket, tmp_path):
    """Two shards, local and on the store, of 13 and 4 samples; pictures of different sizes, one sample with labels, one with what is not ours."""
    first = {f"{i:04d}": {"jpg": bytes([i]) * (700 + 311 * i), "txt": f"caption {i}"} for i in range(13)}
    second = {"a": {"json": {"captions": ["x", "ü"]}, "PNG": b"p", "cls": "1"}, "b": {"npy": b"-" * 3_000, "jpg": b"q", "txt": "of b"}, **pairs(2)}
    paths = [write_shard(tmp_path / f"s-{i:03d}.tar", samples) for i, samples in enumerate((first, second))]
    for path in paths:
        upload(bucket, f"data/{os.path.basename(path)}", path)
    return bucket, paths


def requests(bucket, kind="GET"):
    return [path for method, path in bucket.log if method == kind]


@pytest.mark.parametrize("pattern", ["gs://bucket/data/s-{000..001}.tar", "gs://bucket/data/s-*.tar", "gs://bucket/data/s-00[01].tar"])
def test_records_are_those_of_local_shards(shards, pattern):
    _, paths = shards
    settings = dict(class_names=["zero", "one"])
    local, remote = TarSource(paths, **settings), build_source({"name": "tar", "path": pattern, **settings})
    assert len(remote) == len(local) == 17 and remote.problems == []
    for index in range(17):
        assert remote[index] == local[index] and remote.describe(index) == local.describe(index) and texts_of(remote, index) == texts_of(local, index)
    assert remote.describe(16) == "s-001.tar:0001"


def test_a_record_is_one_request_of_little_more_than_its_bytes(shards):
    bucket, _ = shards
    source = TarSource("gs://bucket/data/s-*.tar", class_names=["zero", "one"])
    for index, size in ((12, 700 + 311 * 12), (13, 1), (14, 1)):
        bucket.log.clear()
        bucket.sent = 0
        source[index]
        assert len(requests(bucket)) == 1 and bucket.sent < size + 8 * 512
    bucket.log.clear()
    texts_of(source, 12)
    assert len(requests(bucket)) == 1


def test_what_lies_far_apart_is_read_member_by_member(shards, tmp_path, monkeypatch):
    bucket, _ = shards
    monkeypatch.setattr("vlm_jax.data.tar_shards._SLACK_BYTES", 2_000)
    source = TarSource("gs://bucket/data/s-001.tar", class_names=["zero", "one"])
    bucket.log.clear()
    assert source[1] == {"image": b"q", "texts": ["of b"]} and len(requests(bucket)) == 1
    upload(bucket, "far.tar", write_shard(tmp_path / "far.tar", {"a": {"txt": "t", "npy": b"-" * 9_000, "jpg": b"j"}}))
    source = TarSource("gs://bucket/far.tar")
    bucket.log.clear()
    bucket.sent = 0
    assert source[0] == {"image": b"j", "texts": ["t"]} and len(requests(bucket)) == 2 and bucket.sent == 2


def test_indexing_skips_large_members_and_reads_small_ones_in_blocks(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "_INDEX_BLOCK", 8_192)
    upload(bucket, "large.tar", write_shard(tmp_path / "large.tar", {f"{i}": {"jpg": b"x" * 300_000, "txt": "t"} for i in range(5)}))
    assert len(TarSource("gs://bucket/large.tar")) == 5
    assert bucket.sent < 5 * 2 * 8_192 + 20_000, "pictures are passed over"
    bucket.log.clear()
    upload(bucket, "small.tar", write_shard(tmp_path / "small.tar", pairs(40, size=20)))
    assert len(TarSource("gs://bucket/small.tar")) == 40
    assert len([path for path in requests(bucket) if path.endswith("small.tar")]) <= -(-os.path.getsize(tmp_path / "small.tar") // 8_192) + 2


def test_the_index_is_kept_beside_the_shard_and_used_until_the_shard_is_another(shards, monkeypatch, tmp_path):
    bucket, _ = shards
    TarSource("gs://bucket/data/s-000.tar")
    assert "bucket/data/s-000.tar.index.npz" in bucket.objects and len(TarSource("gs://bucket/data/s-*.tar")) == 17
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "build_index", lambda path, size: pytest.fail("the stored index was not used"))
        assert len(TarSource("gs://bucket/data/s-*.tar")) == 17
    upload(bucket, "data/s-000.tar", write_shard(tmp_path / "other.tar", pairs(13, size=701)))
    same_size = bucket.objects["bucket/data/s-000.tar"][0]
    assert TarSource("gs://bucket/data/s-000.tar")[3]["image"] == bytes([3]) * 701
    bucket.objects["bucket/data/s-000.tar"] = (same_size.replace(b"caption 3", b"CAPTION 3"), next(bucket.generations))
    built = []
    monkeypatch.setattr(tar_index, "build_index", lambda path, size, build=tar_index.build_index: built.append(path) or build(path, size))
    assert texts_of(TarSource("gs://bucket/data/s-000.tar"), 3) == ["CAPTION 3"] and len(built) == 1, "another generation of the same size"
    bucket.objects["bucket/data/s-000.tar.index.npz"] = (b"PK\3\4 rubbish", next(bucket.generations))
    assert len(TarSource("gs://bucket/data/s-000.tar")) == 13 and len(built) == 2
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))
    del bucket.objects["bucket/data/s-000.tar.index.npz"]
    assert len(TarSource("gs://bucket/data/s-000.tar")) == 13 and "bucket/data/s-000.tar.index.npz" not in bucket.objects
    assert len(os.listdir(tmp_path / "cache" / "tar")) == 1


def test_passing_errors_of_the_store_are_survived_and_lasting_ones_are_named(shards):
    bucket, paths = shards
    bucket.fail_every = 3
    source = TarSource("gs://bucket/data/s-000.tar")
    local = TarSource(paths[0])
    assert [source[i] for i in range(13)] == [local[i] for i in range(13)] and bucket.failures > 3
    bucket.fail_every = 1
    with pytest.raises(DataError, match=r"s-000.tar\[2\]: s-000.tar cannot be read .*503") as error:
        source[2]
    assert error.value.reason == "file_unreadable"
    with pytest.raises(DataError, match="gs://bucket/data cannot be listed .*credentials"):
        TarSource("gs://bucket/data/s-000.tar")
    bucket.fail_every = None
    bucket.objects["bucket/data/s-000.tar"] = (bucket.objects["bucket/data/s-000.tar"][0][:2_000], 99)
    with pytest.raises(DataError, match="cannot be read|ends early") as error:
        source[12]
    assert error.value.reason in ("file_unreadable", "file_cut")


@pytest.mark.parametrize("path, message", [
    ("gs://bucket/data/s-002.tar", "there is no file gs://bucket/data/s-002.tar"), ("gs://bucket/data/t*.tar", "there is no file"),
    ("gs://bucket/nowhere/s.tar", "there is no folder gs://bucket/nowhere"), ("gs://bucket/data/s-{000..002}.tar", "s-002.tar"),
    ("s3://bucket/s.tar", "s3fs"), ("nonsense://bucket/s.tar", "nonsense"),
])
def test_what_is_not_there(shards, path, message):
    with pytest.raises(DataError, match=message):
        TarSource(path)


def test_a_cut_shard_keeps_its_whole_samples(shards):
    bucket, _ = shards
    content = bucket.objects["bucket/data/s-000.tar"][0]
    bucket.objects["bucket/data/cut.tar"] = (content[:12_000], 5)
    source = TarSource("gs://bucket/data/cut.tar")
    assert 0 < len(source) < 13 and "cut" in source.problems[0] and source[len(source) - 1]["texts"]


def test_sources_of_local_files_say_how_to_get_there(bucket):
    with pytest.raises(DataError, match="gs://bucket/x.parquet is on an object store.*mount the bucket"):
        build_source({"name": "parquet", "path": "gs://bucket/x.parquet"})


def test_the_loader_reads_them_with_threads(bucket, tmp_path):
    def png(number):
        buffer = io.BytesIO()
        Image.fromarray(np.full((5, 4, 3), number, np.uint8)).save(buffer, "png")
        return buffer.getvalue()

    samples = {f"{i}": {"png": png(i), "txt": "t"} for i in range(11)}
    upload(bucket, "p.tar", write_shard(tmp_path / "p.tar", samples))
    processor = Processor(image=[["decode", {}], ["resize", {"size": 2}], ["value_range", {"low": 0, "high": 255}]])
    rows = {}
    for path in (str(tmp_path / "p.tar"), "gs://bucket/p.tar"):
        loader = Loader(build_source({"name": "tar", "path": path}), processor, batch_size=4, seed=1, threads=3, on_bad="raise")
        batches = loader.batches(start=0)
        rows[path] = [next(batches)["image"].copy() for _ in range(4)]
    np.testing.assert_array_equal(*rows.values())


def test_a_range_reader_reads_what_a_file_would(bucket, tmp_path):
    content = bytes(range(256)) * 40
    bucket.objects["bucket/f"] = (content, 1)
    reader, rng = RangeReader("gs://bucket/f", len(content), block=300), np.random.default_rng(0)
    for start, size in [(0, 6), *((int(a), int(b)) for a, b in rng.integers([0, 0], [len(content) + 20, 900], size=(60, 2)))]:
        reader.seek(start)
        assert reader.read(size) == content[start:start + size]
        assert reader.read(3) == content[start + size:start + size + 3]
