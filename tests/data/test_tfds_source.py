"""Prepared TFDS folders: read without TensorFlow, and never trusted to import what they like."""
import io
import json
import pickle
import sys

import numpy as np
from PIL import Image
import pytest

from vlm_jax.data.sources import build_source, texts_of
from vlm_jax.data.tfds_source import check_folder, find_folder
from vlm_jax.errors import ConfigError, DataError

tfds = pytest.importorskip("tensorflow_datasets")


def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Three pictures with captions of every form."""
    name = "toy"
    VERSION = tfds.core.Version("1.10.0")

    def _info(self):
        features = tfds.features
        return tfds.core.DatasetInfo(builder=self, disable_shuffling=True, features=features.FeaturesDict({
            "image": features.Image(shape=(None, None, 3), encoding_format="png"), "label": features.ClassLabel(names=["cat", "dog"]),
            "caption": features.Text(), "captions": features.Sequence({"id": np.int64, "text": features.Text()}),
            "attributes": features.Text(), "group": features.Scalar(np.int64)}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": io.BytesIO(png(40 * i)), "label": i % 2, "caption": "" if i == 3 else f"ü {i}", "group": i,
                      "captions": [{"id": j, "text": f"text {i} {j}"} for j in range(2)], "attributes": '{"x": 1}'}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Toy(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_records_keep_encoded_images_and_texts_become_str(data_dir):
    source = build_source({"name": "tfds", "dataset": "toy", "data_dir": str(data_dir), "texts": "caption"})
    assert len(source) == 4 and source.name == "toy:train" and "tensorflow" not in sys.modules
    record = source[1]
    assert record["image"] == png(40) and record["texts"] == ["ü 1"] and record["label"] == 1
    assert record["attributes"] == {"x": 1} and record["group"] == 1
    assert pickle.loads(pickle.dumps(source))[2]["texts"] == ["ü 2"]  # noqa: S301


@pytest.mark.parametrize("settings, texts", [({}, ["text 1 0", "text 1 1"]), ({"texts": "captions/text"}, ["text 1 0", "text 1 1"])])
def test_captions_in_a_sequence_of_fields(data_dir, settings, texts):
    source = build_source({"name": "tfds", "dataset": "toy:1.10.0", "data_dir": str(data_dir), **settings})
    assert texts_of(source, 1) == texts


def test_splits_slices_and_class_names(data_dir):
    folder = str(data_dir / "toy" / "1.10.0")
    assert len(build_source({"name": "array_record", "path": folder, "split": "train[:50%]"})) == 2
    source = build_source({"name": "array_record", "path": folder, "split": "test", "texts": "label"})
    assert source.class_names == ["cat", "dog"] and source.describe(0) == "toy:test[0]"
    with pytest.raises(DataError, match='no split "tset".*Did you mean "test"'):
        build_source({"name": "array_record", "path": folder, "split": "tset"})
    with pytest.raises(DataError, match='no feature "captoin".*Did you mean'):
        build_source({"name": "array_record", "path": folder, "texts": "captoin"})
    with pytest.raises(ConfigError, match='array_record.txts.*Did you mean "texts"'):
        build_source({"name": "array_record", "path": folder, "txts": "caption"})


def test_an_empty_caption_is_a_bad_record(data_dir):
    source = build_source({"name": "tfds", "dataset": "toy", "data_dir": str(data_dir), "texts": "caption"})
    with pytest.raises(DataError, match=r"^toy:train\[3\]: ") as caught:
        source[3]
    assert caught.value.reason == "caption_empty"


def test_a_set_that_is_not_prepared_names_the_command(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="run: python -m vlm_jax.data.prepare coco_captions --data_dir"):
        build_source({"name": "tfds", "dataset": "coco_captions", "data_dir": str(tmp_path)})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("coco_captions/2014", "../x", "/etc", "", "x:9.9.9"):
        with pytest.raises(DataError, match="is not prepared"):
            find_folder(name)


def test_the_newest_version_and_any_config_are_found(tmp_path):
    for name in ("a/1.2.0", "a/1.10.0", "b/big/1.0.0", "b/small/2.0.0", "a/junk"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "features.json").write_text("{}")
    found = {name: str(find_folder(name, str(tmp_path)).relative_to(tmp_path)) for name in ("a", "a:1.2.0", "b", "b/big")}
    assert found == {"a": "a/1.10.0", "a:1.2.0": "a/1.2.0", "b": "b/small/2.0.0", "b/big": "b/big/1.0.0"}


def plant(folder, features, information=None):
    folder.mkdir(exist_ok=True)
    (folder / "features.json").write_text(features if isinstance(features, str) else json.dumps(features))
    (folder / "dataset_info.json").write_text(json.dumps(information or {"name": "x", "fileFormat": "array_record"}))
    return folder


@pytest.mark.parametrize("features", [
    {"pythonClassName": "planted_module.Evil"}, {"type": "planted_module.Evil", "content": {}}, {"python_class_name": "planted_module.Evil"},
    {"type": "planted_module.Evil"}, {"pythonClassName": "tensorflow_datasets_evil.X"}, {"pythonClassName": "vlm_jax..planted_module.Evil"},
    {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
     "featuresDict": {"features": {"a": [{"x": {"pythonClassName": "planted_module.Evil"}}]}}}])
def test_a_planted_class_is_never_imported(tmp_path, monkeypatch, features):
    (tmp_path / "planted_module.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = plant(tmp_path / "set", features)
    with pytest.raises(DataError, match="names the Python class"):
        build_source({"name": "array_record", "path": str(folder)})
    assert not (tmp_path / "canary").exists() and "planted_module" not in sys.modules


def test_other_folders_are_refused_with_a_reason(tmp_path):
    with pytest.raises(DataError, match="no features.json"):
        check_folder(tmp_path)
    with pytest.raises(DataError, match="stored as tfrecord, which needs TensorFlow"):
        check_folder(plant(tmp_path / "a", {}, {"name": "x", "fileFormat": "tfrecord"}))
    for content in ("{", "[" * 100_000, "\x00"):
        with pytest.raises(DataError, match="cannot be read"):
            check_folder(plant(tmp_path / "b", content))
    with pytest.raises(DataError, match="TFDS cannot read it"):
        build_source({"name": "array_record", "path": str(plant(tmp_path / "c", {}))})
