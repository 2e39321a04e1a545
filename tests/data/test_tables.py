"""Tables of one's own pictures: what is read, and what is said about each thing that is wrong."""
import csv
import json
import os
import pickle

import pytest

from vlm_jax.data.sources import build_source, texts_of
from vlm_jax.data.tables import TableSource
from vlm_jax.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(name.encode())
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path


def write(folder, text, name="table.jsonl"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return TableSource(folder / name, folder / "images")


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def test_jsonl_records_in_any_order(folder):
    source = write(folder, lines({"image": "a.jpg", "caption": "ä cat"}, "", {"image": "sub/c.jpg", "captions": ["one", "two"]},
                                 {"image": "b.jpg", "text": "b"}))
    assert len(source) == 3
    assert source[2] == {"image": b"b.jpg", "texts": ["b"]} and source[1] == {"image": b"sub/c.jpg", "texts": ["one", "two"]}
    assert source[-3]["texts"] == ["ä cat"] and texts_of(source, 1) == ["one", "two"]
    assert source.describe(1) == "table.jsonl:3" and pickle.loads(pickle.dumps(source))[1] == source[1]  # noqa: S301


def test_prompts_are_kept_and_pictures_may_be_left_out(folder):
    """What generating models are trained on has a prompt, and perhaps no picture."""
    text = lines({"image": "a.jpg", "prompt": "what is it?", "texts": ["a cat"]}, {"prompt": "", "texts": ["b"]})
    assert write(folder, text)[0] == {"image": b"a.jpg", "prompt": "what is it?", "texts": ["a cat"]}
    alone = TableSource(folder / "table.jsonl", image=None)
    assert [alone[0], alone[1]] == [{"prompt": "what is it?", "texts": ["a cat"]}, {"prompt": "", "texts": ["b"]}]
    (folder / "t.csv").write_text("prompt,text\nsay,word\n")
    assert TableSource(folder / "t.csv", image=None)[0] == {"prompt": "say", "texts": ["word"]}


@pytest.mark.parametrize("name, delimiter, start", [("t.csv", ",", b""), ("t.tsv", "\t", b""), ("t.csv", ",", b"\xef\xbb\xbf")])
def test_csv_fields_may_hold_separators_quotes_and_line_breaks(folder, name, delimiter, start):
    captions = ["plain", f"with {delimiter} separator", 'with "quotes"', "two\r\nlines\nhere", "ünï"]
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image", "caption"])
        for caption in captions:
            writer.writerow(["a.jpg", caption])
        file.write("\n")
    (folder / name).write_bytes(start + (folder / name).read_bytes())
    source = build_source({"name": "table", "path": str(folder / name), "images": str(folder / "images")})
    assert [record["texts"][0] for record in source] == captions and source[4]["image"] == b"a.jpg"
    assert source.describe(4) == f"{name}:8"


def test_columns_labels_and_extras_are_settings(folder):
    (folder / "t.csv").write_text("file,what,species,id\na.jpg,hello,cat,x1\nb.jpg,there,dog,x2\n")
    source = TableSource(folder / "t.csv", folder / "images", image="file", texts="what", label="species", class_names=["cat", "dog"], extras=["id"])
    assert source[1] == {"image": b"b.jpg", "texts": ["there"], "label": 1, "id": "x2"}
    labels = TableSource(folder / "t.csv", folder / "images", image="file", label="species")
    assert labels[0] == {"image": b"a.jpg", "texts": ["cat"]}


@pytest.mark.parametrize("row, reason", [
    ({"image": "a.jpg", "caption": 7}, "caption_not_text"), ({"image": "a.jpg", "caption": ""}, "caption_empty"),
    ({"image": "a.jpg", "captions": []}, "caption_missing"), ({"image": "a.jpg"}, "column_missing"), ({"caption": "x"}, "column_missing"),
    ({"image": "none.jpg", "caption": "x"}, "image_missing"), ({"image": "", "caption": "x"}, "image_missing"),
    ({"image": 3, "caption": "x"}, "image_missing"),
    ({"image": "sub", "caption": "x"}, "image_missing"), ({"image": "../secret.txt", "caption": "x"}, "path_outside"),
    ({"image": "/etc/passwd", "caption": "x"}, "path_outside"), ({"image": "link.jpg", "caption": "x"}, "path_outside"),
    ({"image": "a\u0000b", "caption": "x"}, "path_outside"), ({"image": "x" * 5000, "caption": "x"}, "image_missing"),
    ('{"image": "a.jpg", "caption": "x"', "row_not_json"), ('["a.jpg", "x"]', "row_not_json"), ("[" * 100_000, "row_not_json"),
    ("null", "row_not_json")])
def test_each_bad_line_is_named_with_file_and_line(folder, row, reason):
    os.symlink(folder / "secret.txt", folder / "images" / "link.jpg")
    source = write(folder, lines({"image": "a.jpg", "caption": "fine"}, row))
    assert source[0]["texts"] == ["fine"]
    with pytest.raises(DataError, match=r"^table.jsonl:2: ") as caught:
        source[1]
    assert caught.value.reason == reason and "\n" not in str(caught.value) and "secret" not in str(caught.value).replace("secret.txt", "")


def test_a_line_that_is_not_utf8(folder):
    source = write(folder, b'{"image": "a.jpg", "caption": "ok"}\n{"image": "a.jpg", "caption": "caf\xe9"}\n')
    assert source[0]["texts"] == ["ok"]
    with pytest.raises(DataError, match="table.jsonl:2: byte .* is not UTF-8"):
        source[1]


def test_csv_rows_of_another_length_are_bad_records(folder):
    source = write(folder, "image,caption\na.jpg,one,two\nb.jpg\na.jpg,fine\n", "t.csv")
    for index, line in ((0, 2), (1, 3)):
        with pytest.raises(DataError, match=rf"t.csv:{line}: \d fields, but the header has 2"):
            source[index]
    assert source[2]["texts"] == ["fine"]


def test_limits_hold(folder, monkeypatch):
    source = write(folder, lines({"image": "a.jpg", "caption": "x" * 2**20}, {"image": "a.jpg", "caption": "x"}))
    with pytest.raises(DataError, match="table.jsonl:1: .*over the limit"):
        source[0]
    assert source[1]["image"] == b"a.jpg"


@pytest.mark.parametrize("text, name, message", [
    ("", "t.jsonl", "no records"), ("\n\n", "t.jsonl", "no records"), ("image,caption\n", "t.csv", "no records"), ("", "t.csv", "no header"),
    ("image,captoin\na.jpg,x\n", "t.csv", 'no column "caption".*Did you mean "captoin"'),
    ("picture,caption\na.jpg,x\n", "t.csv", 'no column "image"'),
    ('image,caption\na.jpg,"open\nb.jpg,x\n', "t.csv", "quote left open"), ("x", "t.txt", "format")])
def test_tables_without_use_are_refused_at_once(folder, text, name, message):
    with pytest.raises((DataError, ConfigError), match=message):
        write(folder, text, name)


def test_missing_files_and_folders_are_refused_at_once(folder):
    write(folder, lines({"image": "a.jpg", "caption": "x"}))
    with pytest.raises(DataError, match="no such file"):
        TableSource(folder / "none.jsonl")
    with pytest.raises(DataError, match="no image folder"):
        TableSource(folder / "table.jsonl", folder / "pictures")
    with pytest.raises(IndexError):
        TableSource(folder / "table.jsonl", folder / "images")[1]
