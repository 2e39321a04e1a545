"""Digits: real scans, disjoint splits, words."""
import pickle

import numpy as np
import pytest

from vlm_jax.data.sources import Source
from vlm_jax.data.worlds import digits
from vlm_jax.data.worlds.digits import WORDS, digits_source
from vlm_jax.errors import ConfigError, DataError

pytest.importorskip("sklearn", reason="scikit-learn, which ships the scans, is not installed")


def test_record():
    source = digits_source("validation", size=20)
    record = source[3]
    word = WORDS[record["label"]]
    assert isinstance(source, Source) and len(source) == 250
    assert record["image"].shape == (20, 20, 3) and record["image"].dtype == np.uint8
    assert record["texts"] == source.texts_at(3) == [f"a handwritten {word}", f"the digit {word}", word]
    assert source.class_names[record["label"]] == record["concept"] == word and record["group"] == record["label"]
    # Dark ink on white paper.
    assert record["image"].mean() > 128 and record["image"].min() < 64


def test_splits_are_disjoint_and_complete():
    scans = [source.describe(i).split("scan ")[1] for source in map(digits_source, digits.SPLITS) for i in range(len(source))]
    assert len(scans) == len(set(scans)) == 1797


def test_labels_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits
    data, source = load_digits(), digits_source("test", size=8)
    for i in range(0, 250, 49):
        scan = int(source.describe(i).split("scan ")[1].rstrip(")"))
        assert source[i]["label"] == data.target[scan]
        np.testing.assert_allclose(255 - source[i]["image"][:, :, 1], data.images[scan] * 255 / 16, atol=1)


def test_deterministic_and_small_when_pickled():
    source = digits_source()
    data = pickle.dumps(source)
    assert len(data) < 500
    np.testing.assert_array_equal(pickle.loads(data)[10]["image"], source[10]["image"])  # noqa: S301  (our own bytes)


def test_missing_scikit_learn_is_said(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._scans.cache_clear()
    with pytest.raises(DataError, match="pip install scikit-learn"):
        digits_source()
    digits._scans.cache_clear()


@pytest.mark.parametrize("settings, message", [(dict(split="val"), "split"), (dict(size=7), "digits.size")])
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        digits_source(**settings)
