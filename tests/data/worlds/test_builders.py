"""TFDS sets of the worlds: built without TensorFlow, and read back as the same records."""
import io
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from vlm_jax.data.sources import build_source
from vlm_jax.data.worlds import builders
from vlm_jax.data.worlds.emoji_splits import SPLITS
from vlm_jax.data.worlds.shapes import class_names, shapes_source
from vlm_jax.errors import ConfigError


@pytest.fixture(scope="module")
def needs_tfds():
    pytest.importorskip("tensorflow_datasets", reason="tensorflow_datasets is not installed")
    pytest.importorskip("array_record", reason="array_record is not installed")


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def by_picture(source):
    return {pixels(record["image"]).tobytes(): record for record in (source[i] for i in range(len(source)))}


def test_shapes_round_trip(needs_tfds, tmp_path):
    folder = builders.prepare("shapes", tmp_path, count=6, size=17)
    assert builders.prepare("shapes", tmp_path, count=6, size=17) == folder != builders.world_builder("shapes", tmp_path, count=7, size=17).data_dir
    ours = shapes_source("heldout_pairs", count=6, size=17)
    read = build_source({"name": "array_record", "path": folder, "split": "heldout_pairs"})
    records = by_picture(read)
    assert len(read) == 6 and read.class_names == class_names()
    for i in range(6):
        expected = ours[i]
        record = records[expected["image"].tobytes()]
        assert record["texts"] == expected["texts"] and record["label"] == expected["label"] and record["group"] == expected["group"]
        np.testing.assert_array_equal(record["boxes"], expected["boxes"])
        assert record["attributes"] == expected["attributes"]


def test_several_objects_have_no_label(needs_tfds, tmp_path):
    folder = builders.prepare("shapes", tmp_path, count=3, size=16, objects=[2, 3], captions="detailed")
    record = build_source({"name": "array_record", "path": folder, "split": "train"})[0]
    assert "label" not in record and record["boxes"].shape[0] >= 2


def test_emoji_round_trip(needs_tfds, tmp_path, emoji_cache, monkeypatch):
    from vlm_jax.data.worlds import emoji
    monkeypatch.setenv(emoji.CACHE_VARIABLE, emoji_cache)
    source = emoji.emoji_source

    def few(split, **settings):
        from vlm_jax.data.sources import subset
        return subset(source(split, **settings), 0, 4)

    monkeypatch.setitem(builders.WORLDS, "emoji", (few, SPLITS))
    monkeypatch.delitem(builders._classes, "emoji", raising=False)
    folder = builders.prepare("emoji", tmp_path, size=24, languages=["de", "ja"])
    records = by_picture(build_source({"name": "array_record", "path": folder, "split": "heldout_concepts", "extras": ["languages", "concept"]}))
    monkeypatch.delitem(builders._classes, "emoji")
    ours = source("heldout_concepts", size=24, languages=["de", "ja"])
    for i in range(4):
        record = records[ours[i]["image"].tobytes()]
        assert record["texts"] == ours[i]["texts"] and record["languages"] == ["de", "ja"] and record["concept"] == ours[i]["concept"]


def test_digits_by_name(needs_tfds, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    builders.prepare("digits", tmp_path, size=8)
    source = build_source({"name": "tfds", "dataset": "digits", "data_dir": str(tmp_path), "split": "test"})
    assert len(source) == 250 and source[0]["texts"][2] == source.class_names[source[0]["label"]]


@pytest.mark.parametrize("name, settings, message", [
    ("shape", {}, "shapes"), ("shapes", {"colour": "red"}, "colour"), ("digits", {"size": 3}, "digits.size"),
    ("shapes", {"split": "train"}, "every split"),
])
def test_wrong_settings_before_anything_is_written(tmp_path, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        builders.prepare(name, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_command_line(needs_tfds, tmp_path, capsys):
    from vlm_jax.data import prepare
    prepare.main(["shapes", "--data_dir", str(tmp_path), "--settings", '{"count": 2, "size": 8}'])
    assert str(tmp_path) in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        prepare.main(["shapes", "--data_dir", str(tmp_path), "--settings", '{"sise": 8}'])
    assert stop.value.code == 78 and '"size"' in capsys.readouterr().err


def test_importing_the_worlds_imports_nothing_heavy():
    code = ("import sys; from vlm_jax.data.worlds import builders, digits, emoji, emoji_font, emoji_names, emoji_splits, shape_scenes, shapes; "
            "print([m for m in ('tensorflow_datasets', 'tensorflow', 'torch', 'sklearn', 'jax') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
