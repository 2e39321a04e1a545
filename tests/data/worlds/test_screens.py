"""Synthetic screens: deterministic, schemas come back, splits share no label."""
import pickle

import numpy as np
import pytest

from vlm_jax.data.locations import parse_screen_numbers
from vlm_jax.data.sources import Source, build_source
from vlm_jax.data.worlds.screen_layout import NOUNS, SPLITS, VERBS, labels
from vlm_jax.data.worlds.screens import NUMBERS, TASKS, description, flat, parse_schema, schema, screens_source, texts_of_screen
from vlm_jax.errors import ConfigError


def test_every_record_is_reproducible():
    source = build_source({"name": "screens", "count": 50})
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  (our own bytes)
    assert isinstance(source, Source) and len(source) == 50 and source.describe(6) == "screens/train[6] (ocr)" and source.details["tasks"] == list(TASKS)
    for i in range(10):
        record, copy = source[i], again[i]
        assert record["prompt"] == copy["prompt"] == source.prompt_at(i) and record["texts"] == copy["texts"] == source.texts_at(i)
        np.testing.assert_array_equal(record["image"], copy["image"])
        assert record["task"] == TASKS[i % 5] and record["image"].dtype == np.uint8 and max(record["image"].shape) == 160
    np.testing.assert_array_equal(source[0]["image"], source[4]["image"])
    for other in (source[5]["image"], screens_source(seed=1)[0]["image"]):
        assert source[0]["image"].shape != other.shape or (source[0]["image"] != other).any()


def test_splits_share_no_label():
    of = {split: set(labels(split)) for split in SPLITS}
    assert sum(map(len, of.values())) == len(VERBS) * len(NOUNS) == len(set.union(*of.values())) and all(len(found) > 20 for found in of.values())
    for split in SPLITS:
        source = screens_source(split, aspect=(1, 1))
        said = {text for i in range(0, 100, 5) for text in source[i]["ocr"]}
        assert said <= of[split]


@pytest.mark.parametrize("aspect", [(0.25, 0.3), (0.75, 1.6), (3.5, 4)])
def test_elements_lie_on_the_screen_and_schemas_come_back(aspect):
    source = screens_source("test", size=200, aspect=aspect)
    for number in range(15):
        image, elements = source.screen(number)
        height, width = image.shape[:2]
        assert aspect[0] * 0.9 < height / width < aspect[1] * 1.1 and 1 <= len(elements) <= 9
        for element in flat(elements):
            left, top, right, bottom = element.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            patch = image[top:bottom, left:right]
            assert patch.min() != patch.max(), element       # something is drawn there
        tops = [element.box[1] for element in elements]
        assert tops == sorted(tops)
        text = schema(elements, height, width)
        back = parse_schema(text, height, width)
        assert [(e.kind, e.text) for e in flat(back)] == [(e.kind, e.text) for e in flat(elements)]
        for ours, theirs in zip(flat(elements), flat(back)):
            np.testing.assert_allclose(ours.box, theirs.box, atol=1)


@pytest.mark.parametrize("text", ["", "TEXT", "BOX a 1 2 3 4", "TEXT a 1 2 3 4 (", "TEXT a 1 2 3 4)", "TEXT a 1 2 3 4,", "TEXT a 1 2 3 4 x",
                                  "LIST_ITEM 1 2 3 4 (TEXT a 1 2 3 4", "LIST_ITEM 1 2 3 4 (TEXT a 1 2 3 4))"])
def test_what_is_no_schema(text):
    assert parse_schema(text, 100, 100) is None


def test_answers_are_true():
    source, seen = screens_source(count=2000), set()
    for i in range(300):
        record = source[i]
        image, elements = source.screen(i // 5)
        height, width = image.shape[:2]
        text, prompt = record["texts"][0], record["prompt"]
        if record["task"] == "ocr":
            assert text.split(", ") == texts_of_screen(elements) == record["ocr"]
        elif record["task"] == "question":
            seen.add(prompt.split()[0] + prompt.split()[1])
            if prompt.startswith("how many"):
                kind = {"list": "LIST_ITEM", "buttons": "BUTTON", "fields": "INPUT", "pictures": "IMAGE"}[prompt.split()[2]]
                assert text == NUMBERS[sum(element.kind == kind for element in elements)]
            elif prompt.startswith("which icon"):
                label = prompt.removeprefix("which icon is next to ").rstrip("?")
                assert (text, label) in {(e.children[0].text, e.children[1].text) for e in elements if e.kind == "LIST_ITEM"}
        elif record["task"] == "caption":
            np.testing.assert_allclose(parse_screen_numbers(prompt, height, width), record["boxes"][0], atol=1)
            assert text in {description(element) for element in elements}
        elif record["task"] == "navigate":
            np.testing.assert_allclose(parse_screen_numbers(text, height, width), record["boxes"][0], atol=1)
            element, = [e for e in elements if description(e).split(" ", 1)[1] == prompt.removeprefix("select the ")]
            assert tuple(record["boxes"][0]) == element.box
    assert {"howmany", "whichicon", "whatis", "whatdoes"} <= seen


@pytest.mark.parametrize("settings, message", [
    (dict(split="tests"), 'Did you mean "test"'), (dict(tasks=["qa"]), "tasks"), (dict(tasks=[]), "is empty"), (dict(size=20), "size"),
    (dict(count=0), "count"), (dict(aspect=(2, 1)), "aspect"), (dict(aspect=5), "aspect"), (dict(seed=True), "seed"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        screens_source(**settings)
