"""Preparing: our own sets without TensorFlow, public ones with it, and what is said where it is missing."""
import sys
import types

import pytest

from vlm_jax.data import prepare as module
from vlm_jax.data.prepare import main, prepare
from vlm_jax.data.sources import build_source, texts_of
from vlm_jax.errors import ConfigError, DataError


def test_an_own_set_is_prepared_once_and_read_back(tmp_path, capsys):
    main(["shapes", "--data_dir", str(tmp_path), "--settings", '{"size": 16, "count": 6}'])
    folder = capsys.readouterr().out.splitlines()[0]
    source = build_source({"name": "array_record", "path": folder, "split": "train"})
    drawn = build_source({"name": "shapes", "split": "train", "size": 16, "count": 6})
    assert len(source) == len(drawn)
    record = source[1]                                               # TFDS shuffles
    assert sorted(texts_of(source, i) for i in range(6)) == sorted(texts_of(drawn, i) for i in range(6))
    same = next(other for other in drawn if other["texts"] == record["texts"])
    assert isinstance(record["image"], bytes) and record["image"].startswith(b"\x89PNG")
    assert record["attributes"] == same["attributes"] and record["group"] == same["group"] and record["concept"] == same["concept"]
    main(["shapes", "--data_dir", str(tmp_path), "--settings", '{"size": 16, "count": 6}'])
    assert capsys.readouterr().out.splitlines()[0] == folder


def test_a_public_set_without_tensorflow_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(SystemExit) as caught:
        main(["coco_captions", "--data_dir", str(tmp_path)])
    assert caught.value.code == 65
    message = capsys.readouterr().err
    assert message.startswith("error: prepare coco_captions") and "pip install 'vlm_jax[tf]'" in message and message.count("\n") == 1


def test_a_public_set_is_built_in_a_readable_format(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    calls = {}

    class Builder:
        data_dir = tmp_path / "toy" / "1.0.0"

        def download_and_prepare(self, **settings):
            calls.update(settings)

    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: calls.update(name=name, data_dir=data_dir) or Builder())
    assert prepare("toy", str(tmp_path)) == str(Builder.data_dir)
    assert calls == {"name": "toy", "data_dir": str(tmp_path), "file_format": "array_record"}


def test_an_unknown_set_and_a_failed_download_are_one_line(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))

    def missing(name, data_dir):
        raise tfds.core.DatasetNotFoundError("no\nsuch set")
    monkeypatch.setattr(tfds, "builder", missing)
    monkeypatch.setattr(module, "_known_sets", lambda tfds: ["coco_captions", "mnist"])
    with pytest.raises(DataError, match='Did you mean "coco_captions"') as caught:
        prepare("coco_caption", str(tmp_path))
    assert "\n" not in str(caught.value)

    def broken(name, data_dir):
        raise OSError("the server\nis gone")
    monkeypatch.setattr(tfds, "builder", broken)
    with pytest.raises(DataError, match="prepare mnist: the server; "):
        prepare("mnist", str(tmp_path))


def test_wrong_arguments_are_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match="tfrecord"):
        prepare("shapes", str(tmp_path), "tfrecord")
    with pytest.raises(ConfigError, match="--settings are for"):
        prepare("mnist", str(tmp_path), size=3)
    with pytest.raises(SystemExit) as caught:
        main(["shapes", "--settings", "{size}"])
    assert caught.value.code == 78 and "not JSON" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare("shapes", str(tmp_path / "file"))
