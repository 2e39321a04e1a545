"""The shapes source: deterministic, balanced, and never shows a held-out pair in training."""
from collections import Counter
import pickle

import numpy as np
import pytest

from vlm_jax.data.sources import Source, build_source
from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES
from vlm_jax.data.worlds.shapes import HELDOUT_PAIRS, PROMPTS, TRAIN_PAIRS, class_names, shapes_source
from vlm_jax.errors import ConfigError


def test_record():
    source = shapes_source("heldout_pairs", size=33)
    record = source[4]
    color, shape = record["attributes"]["color"], record["attributes"]["shape"]
    assert isinstance(source, Source) and source.name == "shapes/heldout_pairs" and source.describe(4) == "shapes/heldout_pairs[4]"
    assert record["image"].shape == (33, 33, 3) and record["image"].dtype == np.uint8 and record["boxes"].shape == (1, 4)
    assert record["texts"] == source.texts_at(4) and record["texts"][0] == f"a {color} {shape}"
    assert source.class_names[record["label"]] == f"{color} {shape}" and type(record["label"]) is int


def test_held_out_pairs_are_balanced():
    assert len(HELDOUT_PAIRS) == 20 and len(TRAIN_PAIRS) == 80 and not set(HELDOUT_PAIRS) & set(TRAIN_PAIRS)
    for position in (0, 1):
        assert set(Counter(pair[position] for pair in HELDOUT_PAIRS).values()) == {2}
        assert set(Counter(pair[position] for pair in TRAIN_PAIRS).values()) == {8}


@pytest.mark.parametrize("objects", [1, (1, 3)])
def test_splits_show_their_pairs(objects):
    pairs = {}
    for split in ("train", "validation", "heldout_pairs"):
        source = shapes_source(split, size=8, objects=objects)
        pairs[split] = {(t.color, t.shape) for i in range(1500) for t in source.scene(i)}
    named = [{(list(COLORS)[c], SHAPES[s]) for c, s in pairs} for pairs in (TRAIN_PAIRS, HELDOUT_PAIRS)]
    assert pairs["train"] == pairs["validation"] == named[0] and pairs["heldout_pairs"] == named[1]


def test_a_record_depends_on_seed_split_and_index_alone():
    first, again = shapes_source(size=24), shapes_source(size=24, count=10)
    second = again[3]
    for _ in range(2):
        np.testing.assert_array_equal(first[3]["image"], second["image"])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(first))[3]["image"], second["image"])  # noqa: S301  (our own bytes)
    np.testing.assert_array_equal(again[-1]["image"], again[9]["image"])
    for other in (shapes_source(size=24, seed=1), shapes_source("validation", size=24)):
        assert any((other[i]["image"] != first[i]["image"]).any() for i in range(3))


def test_the_scene_does_not_depend_on_the_size():
    small, large = shapes_source(size=32), shapes_source(size=64)
    for i in range(5):
        assert small.scene(i) == large.scene(i)
        np.testing.assert_allclose(2 * small[i]["boxes"], large[i]["boxes"], atol=2)


def test_single_shapes_are_large_and_inside():
    source = shapes_source(size=64)
    for i in range(200):
        scene = source.scene(i)[0]
        assert 0.60 <= scene.side <= 0.85 and scene.side / 2 <= scene.x <= 1 - scene.side / 2 and abs(scene.angle) <= 12


def test_several_objects_do_not_overlap():
    source = shapes_source(objects=(2, 4), captions="detailed", size=64, count=60)
    numbers = set()
    for i in range(60):
        record = source[i]
        boxes = record["boxes"]
        numbers.add(len(boxes))
        assert len(record["attributes"]["objects"]) == len(boxes) and "label" not in record and record["texts"]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 64).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert len({tuple(t.items()) for t in record["attributes"]["objects"]}) == len(boxes)
        for j, first in enumerate(boxes):
            for second in boxes[j + 1:]:
                width, height = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
                assert width <= 3 or height <= 3
    assert numbers == {2, 3, 4}


def test_detailed_captions_are_true():
    source = shapes_source(captions="detailed", size=32)
    for i in range(100):
        scene, record = source.scene(i)[0], None
        text = source.texts_at(i)[0]
        assert ("large" in text) == (scene.side > 0.4) and ("left" in text) == (scene.x < 0.4) and ("bottom" in text) == (scene.y > 0.6)
        if i < 5:
            record = source[i]
            assert record["attributes"]["size"] == scene.size and record["attributes"]["place"] == scene.place


def test_class_names_and_prompts():
    names = class_names()
    assert len(set(names)) == 100 and names[0] == "red circle"
    # No name begins with a vowel, so "a {}" is right for all.
    assert all(name[0] not in "aeiou" for name in names) and all("{}" in prompt for prompt in PROMPTS)


def test_end_of_the_source():
    source = shapes_source(count=5, size=8)
    assert len(source) == 5 and len(list(source)) == 5
    with pytest.raises(IndexError, match="5 records"):
        source.texts_at(5)
    assert build_source({"name": "shapes", "size": 8, "limit": 3}).class_names == class_names()


@pytest.mark.parametrize("settings, message", [
    (dict(split="heldout"), "heldout_pairs"), (dict(captions="long"), "captions"), (dict(count=0), "shapes.count"), (dict(size=4), "shapes.size"),
    (dict(objects=(2, 1)), "objects"), (dict(objects=5), "objects"), (dict(objects="two"), "objects"), (dict(seed=-1), "seed"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        shapes_source(**settings)
