"""Interleaved documents from JSONL files and tar shards, in four styles, with their filters; and every way in which one can be bad."""
import base64
import io
import json
import os
import pickle
import tarfile
import tracemalloc

from hypothesis import given, settings, strategies
import numpy as np
from PIL import Image
import pytest

from tests.data.test_interleaved import processor
from vlm_jax.data.interleaved_source import InterleavedSource, hashed_share, segments_of
from vlm_jax.data.loader import Loader
from vlm_jax.data.sources import Source, build_source, texts_of
from vlm_jax.errors import ConfigError, DataError


def png(value, size=5):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder, documents, name="pages.jsonl"):
    os.makedirs(folder / "images", exist_ok=True)
    for value in (10, 20, 30):
        (folder / "images" / f"{value}.png").write_bytes(png(value))
    (folder / name).write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in documents), encoding="utf-8")
    return folder / name


def grey(image):
    return Image.open(io.BytesIO(image)).getpixel((0, 0))[0]


def read(source, index=0):
    """The document as a list of texts, of the grey values of its pictures, and of lists of those of its videos."""
    return [segment["text"] if segment["kind"] == "text" else grey(segment["image"]) if segment["kind"] == "image" else [grey(one) for one in segment["frames"]]
            for segment in source[index]["segments"]]


B64 = base64.b64encode(png(77)).decode()
INFO = [{"image_name": "images/10.png", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "images/20.png", "matched_text_index": 1, "matched_sim": 0.4},
        {"image_name": "x", "image_base64": B64, "matched_text_index": 3, "matched_sim": 0.2},
        {"image_name": "images/30.png", "matched_text_index": 0, "matched_sim": 0.25}]
MMC4 = {"text_list": ["one", "two", "three", "four"], "image_info": INFO, "url": "page"}


def test_four_styles(tmp_path):
    path = write(tmp_path, [
        {"segments": [{"kind": "text", "text": "a", "loss": False}, {"kind": "image", "image": "images/10.png"}, {"kind": "text", "text": "b"},
                      {"kind": "image", "base64": B64}], "id": "p1", "language": "de", "next_image": True},
        MMC4,
        {"texts": ["one", None, None, "two"], "images": [None, "images/20.png", None, None]},
        {"text": "see <image> and <image>.", "images": ["images/10.png", f"data:image/png;base64,{B64}"]},
        {"text": "alone"},
    ])
    source = build_source({"name": "interleaved", "path": str(path)})
    assert isinstance(source, Source) and len(source) == 5
    assert [read(source, i) for i in range(5)] == [["a", 10, "b", 77], [30, "one", 20, "two three", 77, "four"], ["one", 20, "two"],
                                                  ["see ", 10, " and ", 77, "."], ["alone"]]
    assert source[0]["segments"][0]["loss"] is False and source[0]["id"] == "p1" and source[0]["language"] == "de" and source[0]["next_image"] is True
    assert texts_of(source, 1) == ["one", "two three", "four"] and source.describe(3) == "pages.jsonl:4"
    assert read(pickle.loads(pickle.dumps(source)), 3) == read(source, 3)  # noqa: S301  (our own bytes)
    batch = next(Loader(source, processor(), 5, shuffle=False, on_bad="raise").batches())
    assert batch["mask"].all() and (batch["media_index"].max(1) == [1, 2, 0, 1, -1]).all()


def test_filters_of_pictures(tmp_path):
    path = write(tmp_path, [MMC4])
    for more, expected in ((dict(one_to_one=False), [30, "one", 10, 20, "two three", 77, "four"]),
                           (dict(min_similarity=0.24), [30, "one", 20, "two three four"]),
                           (dict(max_images=1), [30, "one", "two three", "four"]), (dict(min_similarity=0.9), ["one two three four"]),
                           (dict(min_similarity=0.35, one_to_one=False), ["one", 20, "two three four"])):
        assert read(InterleavedSource(path, **more)) == expected
    with pytest.raises(DataError, match="filters leave no document"):
        InterleavedSource(path, min_similarity=0.9, min_images=1)


def test_filters_of_documents_are_a_hash_of_the_id(tmp_path):
    pages = [{"text": "<image> a", "images": ["images/10.png"], "id": i} for i in range(200)] + [{"text": "a", "id": "none"}, "no json", MMC4]
    path = write(tmp_path, pages)
    source = InterleavedSource(path, one_image=0.5, min_images=1)
    kept = {source[i]["id"] for i in range(len(source) - 2)}
    assert kept == {page["id"] for page in pages[:200] if hashed_share(page) < 0.5} and 70 < len(kept) < 130
    assert source.dropped == {"one_image": 200 - len(kept), "too_few_images": 1} and source.details["documents"] == len(kept) + 2
    assert source.describe(len(source) - 2) == "pages.jsonl:202"              # a line that is no JSON stays, to be counted
    with pytest.raises(DataError, match="pages.jsonl:202"):
        source[len(source) - 2]
    other = write(tmp_path, list(reversed(pages)), "other.jsonl")
    again = InterleavedSource(other, one_image=0.5, min_images=1)
    assert {again[i]["id"] for i in range(2, len(again))} == kept


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_shards(tmp_path):
    shard = write_tar(tmp_path / "a-000.tar", {
        "0001": {"json": {"text_list": ["one", "two"], "image_info": [{"image_name": "1.png", "matched_text_index": 1}, {"image_name": "0001.0.png",
                                                                                                                         "matched_text_index": 0}]},
                 "0.png": png(10), "1.png": png(20)},
        "0002": {"0.png": png(30)},                                                   # no document
        "0003": {"json": {"text": "<image>", "images": ["9.png"]}},
        "0004": {"json": {"segments": [{"kind": "image", "base64": B64}, {"kind": "text", "text": "a"}]}},
    })
    second = write_tar(tmp_path / "a-001.tar", {"x/0005": {"json": {"text": "<image>b", "images": ["jpg"]}, "jpg": png(50)}})
    lines = write(tmp_path, [{"text": "c"}])
    source = InterleavedSource([str(shard), str(second), str(lines)])
    assert len(source) == 5 and read(source, 0) == [10, "one", 20, "two"] and read(source, 2) == [77, "a"] and read(source, 3) == [50, "b"]
    assert read(source, 4) == ["c"] and source.describe(1) == "a-000.tar[1]" and source.describe(4) == "pages.jsonl:1"
    with pytest.raises(DataError, match="no member '9.png'") as error:
        source[1]
    assert error.value.reason == "image_missing"
    # Names of members are no paths, and those of another sample are not found.
    hostile = write_tar(tmp_path / "b.tar", {"../../0001": {"json": {"text": "<image>", "images": ["/etc/passwd"]}},
                                             "2": {"json": {"text": "<image>", "images": ["0001.0.png"]}}})
    for index in range(2):
        with pytest.raises(DataError, match="no member"):
            InterleavedSource(hostile)[index]


def test_videos(tmp_path):
    path = write(tmp_path, [
        {"segments": [{"kind": "text", "text": "a"}, {"kind": "video", "frames": ["images/10.png", f"data:image/png;base64,{B64}"]},
                      {"kind": "text", "text": "b"}, {"kind": "image", "image": "images/30.png"}, {"kind": "text", "text": "c"}]},
        {"frames": [f"images/{10 * (1 + k % 3)}.png" for k in range(9)], "text": "nine", "id": 7}])
    sample = {"json": {"frames": [f"{k}.png" for k in range(4)], "text": "four"}, **{f"{k}.png": png(10 * k) for k in range(4)}}
    shard = write_tar(tmp_path / "v.tar", {"0": sample})
    source = InterleavedSource([str(path), str(shard)], max_frames=3)
    assert [read(source, k) for k in range(3)] == [["a", [10, 77], "b", 30, "c"], [[20, 20, 20], "nine"], [[0, 20, 30], "four"]]
    assert source[1]["id"] == 7 and texts_of(source, 2) == ["four"] and source.outline_at(2)["segments"][0]["frames"][0] == ("path", "0.png")
    assert read(InterleavedSource(path, max_images=1))[1:] == [[10, 77], "b", "c"]
    assert len(InterleavedSource([str(path), str(shard)], min_images=2)) == 1
    made = processor(frames=2)
    batch = next(Loader(source, made, 3, shuffle=False, on_bad="raise").batches())
    assert batch["images"].shape[2] == 2 and batch["media_index"].max(1).tolist() == [1, 0, 0]
    assert not np.allclose(batch["images"][2, 0, 0], batch["images"][2, 0, 1]) and np.allclose(batch["images"][0, 1, 0], batch["images"][0, 1, 1])
    with pytest.raises(ConfigError, match="max_frames"):
        InterleavedSource(path, max_frames=0)


def test_shards_on_an_object_store(bucket, tmp_path):
    samples = {f"{k}": {"json": {"text": f"<image> and <image> {k}", "images": ["1.png", "0.png"]}, "0.png": png(10 + k, 300 + k), "1.png": png(20 + k)}
               for k in range(3)}
    samples["3"] = {"json": {"frames": ["0.png", "1.png"], "text": "v"}, "0.png": png(1), "1.png": png(2)}
    samples["4"] = {"json": {"text": "<image>", "images": ["7.png"]}}
    shard = write_tar(tmp_path / "s.tar", samples)
    bucket.objects["bucket/data/s.tar"] = (shard.read_bytes(), next(bucket.generations))
    local, remote = InterleavedSource(shard), build_source({"name": "interleaved", "path": "gs://bucket/data/*.tar"})
    assert [read(remote, k) for k in range(4)] == [read(local, k) for k in range(4)] == [
        [20, " and ", 10, " 0"], [21, " and ", 11, " 1"], [22, " and ", 12, " 2"], [[1, 2], "v"]]
    for index in (0, 3):
        bucket.log.clear()
        remote[index]
        assert [kind for kind, _ in bucket.log] == ["GET", "GET"], "the document, and all of its sample"
    with pytest.raises(DataError, match="s.tar.4.*no member '7.png'"):
        remote[4]
    with pytest.raises(DataError, match="over the limit of 200") as error:
        InterleavedSource("gs://bucket/data/s.tar", max_bytes=200)[0]
    assert error.value.reason == "file_too_large"
    bucket.objects["bucket/data/pages.jsonl"] = (b'{"text": "a"}\n', next(bucket.generations))
    with pytest.raises(DataError, match="from .tar shards only"):
        InterleavedSource("gs://bucket/data/pages.jsonl")
    del bucket.objects["bucket/data/s.tar"]
    with pytest.raises(DataError, match="is it still there") as error:
        remote[0]
    assert error.value.reason == "file_unreadable"


BAD = [
    ("not json", "row_not_json"), ("[1]", "row_not_json"), ("[" * 100_000, "row_not_json"), ({}, "document_wrong_type"),
    ({"segments": "a"}, "document_wrong_type"), ({"segments": [1]}, "document_wrong_type"), ({"segments": [{"kind": "image"}]}, "image_missing"),
    ({"segments": [{"kind": "image", "image": 3}]}, "image_missing"),
    ({"segments": [{"kind": "text", "text": 3}]}, "document_wrong_type"), ({"segments": [{"kind": "video", "frames": []}]}, "video_empty"),
    ({"segments": [{"kind": "video", "frames": "images/10.png"}]}, "document_wrong_type"),
    ({"frames": ["images/10.png", 3], "text": "a"}, "document_wrong_type"), ({"frames": ["images/10.png", "images/99.png"], "text": "a"}, "image_missing"),
    ({"frames": ["https://example.org/a.png"], "text": "a"}, "image_is_address"), ({"frames": ["images/10.png"], "text": 3}, "document_wrong_type"),
    ({"text": "<image><image>", "images": ["images/10.png"]}, "images_missing"), ({"text": "a", "images": ["images/10.png"]}, "images_unreferenced"),
    ({"text": "<image>"}, "images_missing"), ({"text": 3}, "document_wrong_type"), ({"text": "<image>", "images": [None]}, "document_wrong_type"),
    ({"texts": ["a"], "images": [None, "images/10.png"]}, "images_unreferenced"), ({"texts": ["a", None], "images": [None]}, "images_missing"),
    ({"texts": ["a"], "images": ["images/10.png"]}, "document_wrong_type"), ({"texts": "a", "images": []}, "document_wrong_type"),
    ({"text_list": ["a"], "image_info": [{"image_name": "images/10.png"}]}, "images_unreferenced"),
    ({"text_list": ["a"], "image_info": [{"image_name": "images/10.png", "matched_text_index": 1}]}, "images_unreferenced"),
    ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "document_wrong_type"), ({"text_list": ["a"]}, "document_wrong_type"),
    ({"text_list": [3], "image_info": []}, "document_wrong_type"), ({"text": "<image>", "images": ["images/99.png"]}, "image_missing"),
    ({"text": "<image>", "images": ["../secret.png"]}, "path_outside"), ({"text": "<image>", "images": ["/etc/passwd"]}, "path_outside"),
    ({"text": "<image>", "images": ["images/a\0b"]}, "path_outside"), ({"text": "<image>", "images": ["https://example.org/a.png"]}, "image_is_address"),
    ({"text": "<image>", "images": ["file:///etc/passwd"]}, "image_is_address"), ({"text": "<image>", "images": ["images/link.png"]}, "path_outside"),
    ({"text": "<image>", "images": ["data:image/png;base64,???"]}, "image_not_base64"), ({"segments": [{"kind": "image", "base64": "é"}]}, "image_not_base64"),
    ({"text": "<image>", "images": ["images"]}, "image_missing"),
]
# What the source hands on and the processor finds.
LATER = [({"segments": []}, "document_empty"), ({"texts": [], "images": []}, "document_empty"), ({"text": " "}, "document_empty"),
         ({"segments": [{"kind": "sound"}]}, "document_wrong_type"), ({"text": "a<image>b", "images": ["images/cut.png"]}, "image_truncated"),
         ({"segments": [{"kind": "text", "text": "<image> a"}]}, "images_missing"), ({"text": "<image>", "images": ["images/10.png"]}, "target_empty")]


@pytest.mark.parametrize("number", range(len(BAD) + len(LATER)))
def test_bad_documents_are_named_and_counted(tmp_path, number):
    document, reason = (BAD + LATER)[number]
    path = write(tmp_path, [{"text": "a good one"}, document])
    (tmp_path / "images" / "cut.png").write_bytes(png(9, 200)[:150])
    (tmp_path.parent / "secret.png").write_bytes(png(1))
    os.symlink(tmp_path.parent / "secret.png", tmp_path / "images" / "link.png")
    source = InterleavedSource(path)
    if number < len(BAD):
        with pytest.raises(DataError, match="^pages.jsonl:2: ") as error:
            source[1]
        assert error.value.reason == reason and "\n" not in str(error.value) and len(str(error.value)) < 400
    loader = Loader(source, processor(), 2, shuffle=False, bad_budget=1.0)
    batch = next(loader.batches())
    assert loader.bad == {reason: 1} and batch["mask"].tolist() == [True, False] and "pages.jsonl:2" in loader.bad_examples[0]
    with pytest.raises(DataError, match="pages.jsonl:2"):
        next(Loader(source, processor(), 2, shuffle=False, on_bad="raise").batches())


KEYS = strategies.sampled_from(["kind", "text", "image", "image_name", "matched_text_index", "matched_sim", "base64", "loss"])
LEAF = strategies.one_of(strategies.none(), strategies.booleans(), strategies.integers(-3, 9), strategies.floats(), strategies.text(max_size=9))
JSON = strategies.recursive(LEAF, lambda inner: strategies.one_of(strategies.lists(inner, max_size=4), strategies.dictionaries(KEYS, inner)), max_leaves=9)


@settings(max_examples=150, deadline=None)
@given(strategies.dictionaries(strategies.sampled_from(["segments", "text_list", "image_info", "texts", "images", "text", "frames", "id", "next_image"]), JSON),
       strategies.sampled_from([None, 0.24]))
def test_any_json_is_segments_or_a_data_error(document, min_similarity):
    try:
        segments = segments_of(document, "<image>", min_similarity)
    except DataError as error:
        assert error.reason and "\n" not in str(error)[:80]
        return
    hashed_share(document)
    try:
        processor().format.row([s for s in segments if s.get("kind") not in ("image", "video")])
    except DataError as error:
        assert error.reason


def test_large_files_are_not_held_in_memory(tmp_path):
    path = write(tmp_path, [{"text": "word " * 2000, "id": i} for i in range(400)])
    assert path.stat().st_size > 3_000_000
    tracemalloc.start()
    source = InterleavedSource(path, min_images=0, one_image=0.5)
    assert len(source) == 400 and source[399]["id"] == 399
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 700_000
    with pytest.raises(DataError, match="over the limit of 1000") as error:
        InterleavedSource(path, max_bytes=1000)[0]
    assert error.value.reason == "file_too_large"


def test_wrong_settings_and_files_are_named(tmp_path):
    path = write(tmp_path, [{"text": "a"}])
    for wrong, message in ((dict(max_images=0), "max_images"), (dict(min_similarity="a"), "min_similarity"), (dict(one_image=2), "one_image")):
        with pytest.raises(ConfigError, match=message):
            InterleavedSource(path, **wrong)
    with pytest.raises(DataError, match="no image folder"):
        InterleavedSource(path, images=tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no document"):
        InterleavedSource(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="no file"):
        InterleavedSource(tmp_path / "missing.jsonl")
    np.testing.assert_array_equal(InterleavedSource(path)._rows, [[0, path.stat().st_size, 1, path.stat().st_size]])
