"""Webdataset shards: random access, cut and damaged shards, and shards made to do harm."""
import io
import json
import logging
import os
import pickle
import random
import tarfile

import numpy as np
import pytest

from vlm_jax.data.files import expand_braces
from vlm_jax.data.sources import build_source, texts_of
from vlm_jax.data.tar_index import build_index, index_path, read_members, shard_index, split_key
from vlm_jax.data.tar_shards import TarSource
from vlm_jax.errors import DataError


def write_shard(path, samples, format=tarfile.GNU_FORMAT, raw=()):
    """Writes {key: {ending: content}} and then the TarInfos of `raw`."""
    with tarfile.open(path, "w", format=format) as tar:
        for key, members in samples.items():
            for ending, content in members.items():
                content = json.dumps(content).encode() if isinstance(content, dict) else content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for info, content in raw:
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
    return str(path)


def pairs(count, size=700):
    return {f"{i:04d}": {"jpg": bytes([i]) * size, "txt": f"caption {i}"} for i in range(count)}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_of_every_tar_format_in_any_order(tmp_path, format):
    folder = "folder-" + "d" * (60 if format == tarfile.USTAR_FORMAT else 200)
    samples = {"a": {"jpg": b"image a", "txt": "  a cat\n"},
               f"{folder}/{'b' * 90}": {"json": {"captions": ["x", "ü"]}, "PNG": b"image b", "cls": "3"},
               "c.d": {"webp": b"wrong ending"}, "e": {"jpeg": b"image e", "cls": "1", "npy": b"ignored"}}
    source = TarSource(write_shard(tmp_path / "s.tar", samples, format), class_names=["zero", "one", "two", "three"])
    assert len(source) == 3, "c.d.webp has the key c and the ending d.webp, which is none of ours"
    assert source[2] == {"image": b"image e", "texts": ["one"], "label": 1}
    assert source[1] == {"image": b"image b", "texts": ["x", "ü"], "label": 3}
    assert source[0] == {"image": b"image a", "texts": ["a cat"]} and texts_of(source, 1) == ["x", "ü"]
    assert source.describe(1) == f"s.tar:{folder}/{'b' * 90}" and source.problems == []


def test_shards_by_braces_and_globs(tmp_path):
    for i in range(9, 12):
        write_shard(tmp_path / f"s-{i:03d}.tar", {f"{i}{j}": {"jpg": b"x", "txt": f"{i} {j}"} for j in range(i - 8)})
    source = build_source({"name": "tar", "path": str(tmp_path / "s-{009..011}.tar")})
    assert [texts_of(source, i)[0] for i in range(6)] == ["9 0", "10 0", "10 1", "11 0", "11 1", "11 2"]
    assert len(TarSource(str(tmp_path / "*.tar"))) == 6 and len(TarSource([str(tmp_path / "s-{010,009}.tar")])) == 3
    assert source.describe(4) == "s-011.tar:111" and pickle.loads(pickle.dumps(source))[4] == source[4]  # noqa: S301
    for path, message in (("s-{009..012}.tar", "no file .*s-012.tar"), ("t*.tar", "no file matches")):
        with pytest.raises(DataError, match=message):
            TarSource(str(tmp_path / path))


def test_braces_expand():
    assert expand_braces("a{8..10}b{x,y}") == ["a8bx", "a8by", "a9bx", "a9by", "a10bx", "a10by"]
    assert expand_braces("{00..2}") == ["00", "01", "02"] and expand_braces("{2..1}") == ["2", "1"] and expand_braces("{x}{}") == ["{x}{}"]


def test_the_index_is_kept_and_checked_against_the_shard(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", pairs(3))
    first = shard_index(path)
    stored = index_path(path)
    assert stored == path + ".index.npz" and os.path.exists(stored)
    np.testing.assert_array_equal(shard_index(path).samples, first.samples)
    monkeypatch.setattr("vlm_jax.data.tar_index.build_index", lambda path, size: pytest.fail("the stored index was not used"))
    np.testing.assert_array_equal(shard_index(path).samples, first.samples)
    monkeypatch.undo()
    write_shard(path, pairs(5))
    assert len(shard_index(path).samples) == 5, "another shard, another index"
    for content in (b"", b"PK\3\4 rubbish", pickle.dumps({"samples": 1})):
        with open(stored, "wb") as file:
            file.write(content)
        assert len(shard_index(path).samples) == 5
    status = os.stat(path)
    stamp = np.array([1, status.st_size, status.st_mtime_ns])
    for planted in (np.full((1, 9), 2**40), np.zeros((2, 3), np.int64), np.full((1, 9), -7)):
        np.savez(stored, stamp=stamp, samples=planted, problem=np.array(""))
        assert len(shard_index(path).samples) == 5, "an index that points outside of the shard is not believed"
    np.savez_compressed(stored, stamp=stamp, samples=np.zeros((1_000_000, 9), np.int64), problem=np.array(""))
    assert os.path.getsize(stored) < 200_000
    assert len(shard_index(path).samples) == 5, "an index that inflates to more than its shard is not read"
    with open(stored, "wb") as file:
        np.save(file, np.zeros(3))
    assert len(shard_index(path).samples) == 5, "an array where an archive should be"


def test_the_index_may_live_in_a_cache_or_nowhere(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", pairs(2))
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))
    assert len(TarSource(path)) == 2 and not os.path.exists(path + ".index.npz")
    assert index_path(path).startswith(str(tmp_path / "cache")) and os.path.exists(index_path(path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "file"))
    assert len(TarSource(path)) == 2


def test_a_shard_cut_anywhere_keeps_its_whole_samples(tmp_path, caplog):
    data = open(write_shard(tmp_path / "whole.tar", pairs(4)), "rb").read()
    each = 4 * 512 + 512                                             # two headers, 700 bytes in two blocks, a caption in one
    path = str(tmp_path / "cut.tar")
    for cut in range(1, 4 * each + 1, 171):
        with open(path, "wb") as file:
            file.write(data[:cut])
        os.utime(path, ns=(cut, cut))
        # A sample is whole once its caption is there; the padding after it may be missing.
        whole = sum(cut >= i * each + 4 * 512 + len(f"caption {i}") for i in range(4))
        if not whole:
            with pytest.raises(DataError, match="whole sample|not a tar"):
                TarSource(path)
            continue
        with caplog.at_level(logging.WARNING):
            source = TarSource(path)
        assert len(source) == whole, cut
        assert [source[i] for i in range(whole)] == [{"image": bytes([i]) * 700, "texts": [f"caption {i}"]} for i in range(whole)]
        assert len(source.problems) == 1 and f"kept {whole} whole samples" in source.problems[0] and source.problems[0] in caplog.text
        assert "cut.tar: cut " in source.problems[0]


def test_a_damaged_header_keeps_what_comes_before(tmp_path):
    path = write_shard(tmp_path / "s.tar", pairs(4))
    with open(path, "r+b") as file:
        file.seek(2 * 2560 + 5)
        file.write(b"\xff")
    source = TarSource(path)
    assert len(source) == 2 and "damaged header at byte 5120" in source.problems[0]


@pytest.mark.parametrize("sample, reason", [
    ({"txt": "no image"}, "image_missing"), ({"jpg": b"x"}, "caption_missing"), ({"jpg": b"x", "txt": " "}, "caption_empty"),
    ({"jpg": b"x", "txt": b"\xff"}, "caption_not_utf8"), ({"jpg": b"x", "json": "{"}, "row_not_json"), ({"jpg": b"x", "json": "[1]"}, "row_not_json"),
    ({"jpg": b"x", "json": "[" * 90_000}, "row_not_json"), ({"jpg": b"x", "json": {"caption": 3}}, "caption_not_text"),
    ({"jpg": b"x", "json": {"other": "x"}}, "caption_missing"), ({"jpg": b"x", "cls": "77"}, "label_unknown"),
    ({"jpg": b"x", "txt": "y" * 2**21}, "file_too_large"), ({"jpg": b"x" * 2**13, "txt": "y"}, "file_too_large")])
def test_each_bad_sample_is_named(tmp_path, sample, reason):
    source = TarSource(write_shard(tmp_path / "s.tar", {"good": {"jpg": b"x", "txt": "fine"}, "bad": sample}), class_names=["a"], max_bytes=4096)
    assert source[0]["texts"] == ["fine"]
    with pytest.raises(DataError, match="^s.tar:bad") as caught:
        source[1]
    assert caught.value.reason == reason and "\n" not in str(caught.value)


def special(name, kind, target="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def test_a_malicious_shard_touches_nothing(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    raw = [(special("k1.jpg", tarfile.SYMTYPE, str(secret)), None), (special("k1.txt", tarfile.REGTYPE, size=2), b"k1"),
           (special("k2.jpg", tarfile.LNKTYPE, "good.jpg"), None), (special("k2.txt", tarfile.REGTYPE, size=2), b"k2"),
           (special("fifo.jpg", tarfile.FIFOTYPE), None), (special("dev.jpg", tarfile.CHRTYPE), None), (special("dir.jpg", tarfile.DIRTYPE), None),
           (special("../../escape.jpg", tarfile.REGTYPE, size=1), b"e"), (special("../../escape.txt", tarfile.REGTYPE, size=6), b"escape"),
           (special(str(tmp_path / "absolute.jpg"), tarfile.REGTYPE, size=1), b"a"), (special("p.pyd", tarfile.REGTYPE, size=4), b"\x80\x04N."),
           (special("p.pickle", tarfile.REGTYPE, size=4), b"\x80\x04N.")]
    folder = tmp_path / "shards"
    folder.mkdir()
    source = TarSource(write_shard(folder / "s.tar", {"good": {"jpg": b"g", "txt": "good"}}, raw=raw))
    names = [source.describe(i).split(":", 1)[1] for i in range(len(source))]
    assert names[:4] == ["good", "k1", "k2", "../../escape"] and len(names) == 5
    for i in (1, 2):
        with pytest.raises(DataError) as caught:
            source[i]
        assert caught.value.reason == "image_missing"
    assert source[3] == {"image": b"e", "texts": ["escape"]}, "an odd name is only a name"
    assert sorted(os.listdir(tmp_path)) == ["secret.jpg", "shards"] and sorted(os.listdir(folder)) == ["s.tar", "s.tar.index.npz"]


def test_other_files_are_refused_at_once(tmp_path):
    for content, message in ((b"\x1f\x8b\x08" + bytes(600), "compressed"), (bytes(range(256)) * 8, "not a tar"), (b"", "no whole sample|not a tar"),
                             (bytes(10240), "no whole sample"), (b"short", "not a tar")):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            TarSource(str(tmp_path / "x.tar"))


def test_mutated_shards_give_whole_samples_or_one_clear_error(tmp_path):
    """2,000 shards with changed, removed, doubled or zeroed bytes: nothing but a DataError ever comes out, and no record is larger than the file."""
    write_shard(tmp_path / "g.tar", {"a": {"jpg": b"x" * 30, "txt": "a"}, "n" * 120: {"json": {"caption": "b"}, "png": b"y" * 600}})
    write_shard(tmp_path / "p.tar", {"ü" * 60: {"jpg": b"x" * 30, "txt": "a"}, "b": {"cls": "3", "png": b"y"}}, tarfile.PAX_FORMAT)
    data, pax = ((tmp_path / name).read_bytes()[:6144] for name in ("g.tar", "p.tar"))
    rng, path, outcomes = random.Random(0), str(tmp_path / "m.tar"), {"ok": 0, "error": 0}
    fields = [(0, 100), (100, 24), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155), (0, 512)]
    for number in range(2000):
        mutant = bytearray(rng.choice((data, pax)))
        for _ in range(rng.randint(1, 3)):
            start, length = rng.choice(fields)
            at = 512 * rng.randrange(len(mutant) // 512) + start + rng.randrange(length)
            mutant[at:at + rng.choice((1, 1, 4))] = rng.choice((bytes([rng.randrange(256)]), b"", bytes(4), b"\xff\xff", b"7777", b"L", b"\x80"))
        if rng.random() < 0.7:                                       # a right checksum lets the change through to the parser
            for at in range(0, len(mutant) - 511, 512):
                if mutant[at + 257:at + 262] == b"ustar":
                    mutant[at + 148:at + 156] = b" " * 8
                    mutant[at + 148:at + 156] = b"%06o\0 " % sum(mutant[at:at + 512])
        with open(path, "wb") as file:
            file.write(mutant)
        try:
            index = build_index(path)
            assert (index.samples[:, 1::2] + index.samples[:, 2::2] <= len(mutant)).all()
            if number % 4 == 0:
                os.utime(path, ns=(number, number))
                source = TarSource(path)
                for i in range(len(source)):
                    try:
                        record = source[i]
                        assert len(record["image"]) <= len(mutant) and record["texts"]
                    except DataError as error:
                        assert error.reason and "\n" not in str(error)
            outcomes["ok"] += 1
        except DataError as error:
            assert "\n" not in str(error)
            outcomes["error"] += 1
    assert outcomes["ok"] > 250 and outcomes["error"] > 25, outcomes


def test_huge_sizes_in_headers_end_the_reading():
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    header[124:136] = b"\x80" + b"\xff" * 11
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    for kind in (b"0", b"x", b"L", b"g", b"K", b"V"):
        header[148:156], header[156:157] = b" " * 8, kind
        header[148:156] = b"%06o\0 " % sum(header)
        with pytest.raises(DataError, match="damaged|cut"):
            list(read_members(io.BytesIO(bytes(header) + bytes(100))))


def test_keys_split_as_webdataset_splits_them():
    assert split_key("a/b.c/d.seg.png") == ("a/b.c/d", "seg.png") and split_key("x.JPG") == ("x", "jpg")
    assert split_key(".hidden")[1] == split_key("plain")[1] == split_key("a/._x.jpg")[1] == ""
