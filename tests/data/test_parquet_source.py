"""Parquet shards: both forms of image columns, captions as string or list, and what is said about bad ones."""
import pickle

import pytest

from vlm_jax.data.sources import build_source, texts_of
from vlm_jax.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, columns, group=2):
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


def build(path, **settings):
    return build_source({"name": "parquet", "path": str(path), **settings})


def test_records_across_files_and_row_groups(tmp_path):
    for shard, start in ((0, 0), (1, 5)):
        write(tmp_path / f"s-{shard}.parquet", {"image": [{"bytes": bytes([i]), "path": f"{i}.jpg"} for i in range(start, start + 5)],
                                                "caption": [f"number {i}" for i in range(start, start + 5)], "other": [0] * 5})
    source = build(tmp_path / "s-{0..1}.parquet", cached_groups=1)
    order = [7, 0, 9, 4, 5, 1, 2, 8, 3, 6]
    assert len(source) == 10 and [source[i] for i in order] == [{"image": bytes([i]), "texts": [f"number {i}"]} for i in order]
    assert texts_of(source, -1) == ["number 9"] and source.describe(6) == "s-1.parquet:row 1"
    assert pickle.loads(pickle.dumps(source))[8] == source[8]  # noqa: S301


def test_binary_images_lists_of_captions_labels_and_extras(tmp_path):
    path = write(tmp_path / "t.parquet", {"picture": [b"a", b"b", b"c"],
                                          "says": [["x"], ["y", "z"], ["w"]], "kind": [1, 0, 1], "id": ["p", "q", "r"]})
    source = build(path, image="picture", texts="says", label="kind", class_names=["cat", "dog"], extras=["id"])
    assert source[1] == {"image": b"b", "texts": ["y", "z"], "label": 0, "id": "q"}
    assert build(path, image="picture", label="kind", class_names=["cat", "dog"])[2] == {"image": b"c", "texts": ["dog"], "label": 1}


def test_bad_rows_have_a_reason(tmp_path):
    captions = [["a"], ["a"], None, [], [""], ["a", None]]
    path = write(tmp_path / "t.parquet", {"image": [None, b"", b"x", b"x", b"x", b"x"], "captions": captions}, group=10)
    source = build(path)
    for index, reason in enumerate(["image_missing", "image_missing", "caption_missing", "caption_missing", "caption_empty", "caption_not_text"]):
        with pytest.raises(DataError, match=f"^t.parquet:row {index}: ") as caught:
            source[index]
        assert caught.value.reason == reason


def test_a_column_of_numbers_is_no_caption(tmp_path):
    source = build(write(tmp_path / "t.parquet", {"image": [b"x"], "caption": [3]}))
    with pytest.raises(DataError, match="int 3, not a string"):
        source[0]


def test_files_without_use_are_refused_at_once(tmp_path):
    (tmp_path / "rubbish.parquet").write_bytes(b"PAR1 not really PAR1")
    write(tmp_path / "empty.parquet", {"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    write(tmp_path / "t.parquet", {"image": [b"x"], "captoin": ["a"]})
    for name, message in (("rubbish", "damaged or not parquet"), ("empty", "no rows"), ("t", 'no column "caption".*Did you mean "captoin"'),
                          ("none", "no file")):
        with pytest.raises(DataError, match=message):
            build(tmp_path / f"{name}.parquet")


def test_a_row_group_damaged_after_the_start_is_a_bad_record(tmp_path):
    path = tmp_path / "t.parquet"
    write(path, {"image": [bytes([i % 251]) * 5000 for i in range(6)], "caption": ["a"] * 6})
    source = build(path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:200] + b"\xff" * 400 + data[600:])
    outcomes = []
    for index in range(6):
        try:
            source[index]
            outcomes.append("ok")
        except DataError as error:
            outcomes.append(error.reason)
    assert outcomes[-1] == "ok" and set(outcomes) <= {"ok", "file_unreadable"}
    path.unlink()
    with pytest.raises(DataError, match="t.parquet:row 0") as caught:
        build_source_again(source)
    assert caught.value.reason == "file_unreadable"


def build_source_again(source):
    return pickle.loads(pickle.dumps(source))[0]  # noqa: S301  (a copy has no cached row groups)
