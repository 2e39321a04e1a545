"""Sources by name, arrays, parts and mixtures."""
import numpy as np
import pytest

from vlm_jax.data.sources import (
    ArraySource,
    MixtureSource,
    Source,
    build_source,
    check_texts,
    class_text,
    locate_part,
    mixture_source,
    offsets_of,
    subset,
    texts_of,
)
from vlm_jax.errors import ConfigError, DataError

IMAGES = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


def letters(count, start="a", **settings):
    return ArraySource(IMAGES[np.arange(count) % 5], [chr(ord(start) + i) for i in range(count)], **settings)


def test_arrays_become_records():
    source = ArraySource(IMAGES, ["a", ["b", "B"], "c", "d", "e"], labels=[3, 1, 2, 0, 0], extras={"group": [7, 7, 1, 2, 3]})
    assert isinstance(source, Source) and len(source) == 5
    record = source[1]
    assert record["texts"] == ["b", "B"] and record["label"] == 1 and record["group"] == 7
    np.testing.assert_array_equal(record["image"], IMAGES[1])
    assert texts_of(source, -1) == ["e"] and [r["texts"][0] for r in source] == list("abcde")


def test_labels_alone_give_class_names_as_texts():
    source = build_source({"name": "arrays", "images": IMAGES, "labels": np.array([1, 0, 1, 1, 0]), "class_names": ["cat", "dog"]})
    assert [texts_of(source, i) for i in range(3)] == [["dog"], ["cat"], ["dog"]] and source[0]["label"] == 1


@pytest.mark.parametrize("arguments, message", [
    (dict(images=IMAGES, texts=["a"]), "lengths differ .images 5, texts 1."), (dict(images=IMAGES), "neither texts nor labels"),
    (dict(images=[], texts=[]), "no images"), (dict(images=IMAGES, texts=list("abcde"), labels=[1]), "labels 1")])
def test_arrays_that_do_not_fit_are_refused_at_once(arguments, message):
    with pytest.raises(DataError, match=message):
        ArraySource(**arguments)


@pytest.mark.parametrize("value, reason", [
    (None, "caption_missing"), ([], "caption_missing"), ("", "caption_empty"),
    (["ok", " \n"], "caption_empty"), (7, "caption_not_text"),
    (["ok", None], "caption_not_text"), ({"text": "x"}, "caption_not_text"),
    (b"bytes", "caption_not_text"), (float("nan"), "caption_not_text")])
def test_captions_that_cannot_be_used_have_a_reason(value, reason):
    with pytest.raises(DataError, match="^item 3: ") as caught:
        check_texts(value, "item 3")
    assert caught.value.reason == reason
    assert check_texts("x", lambda: 1 / 0) == ["x"], "the item is named only when needed"


@pytest.mark.parametrize("label, names, expected", [
    (1, ["a", "b"], (1, "b")), ("b", ["a", "b"], (1, "b")), (np.int64(0), ["a"], (0, "a")), ("1", ["a", "b"], (1, "b")), ("12", None, (12, "12")),
    ("cat", None, (None, "cat")), ("7", ["7", "x"], (0, "7")), (4, None, (4, "4"))])
def test_classes_by_number_and_by_name(label, names, expected):
    assert class_text(label, names, "item") == expected


@pytest.mark.parametrize("label, names", [
    (2, ["a", "b"]), (-1, ["a"]), ("c", ["a"]), (None, None), (True, None), (1.5, ["a", "b"]), ("", None), ("\u00b2", ["a"])])
def test_classes_that_do_not_exist(label, names):
    with pytest.raises(DataError) as caught:
        class_text(label, names, "item")
    assert caught.value.reason == "label_unknown"


@pytest.mark.parametrize("settings, message", [
    ({"name": "emojis"}, 'Did you mean "emoji"'), ({}, "name is missing"), ({"name": "arrays", "image": IMAGES}, 'Did you mean "images"'),
    ({"name": "table"}, "path is missing"), ({"name": "arrays", "images": IMAGES, "texts": list("abcde"), "limit": 0}, "limit"),
    ({"name": "arrays", "images": IMAGES, "texts": list("abcde"), "subset": [3, 3]}, "empty"),
    ({"name": "arrays", "images": IMAGES, "texts": list("abcde"), "subset": 3}, "subset"), ("shapes", "section")])
def test_wrong_sections_name_their_place(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_source(settings, "evaluations.x.source")
    assert "evaluations.x.source" in str(caught.value)


def test_subset_and_limit_are_common_to_all_sources():
    settings = {"name": "arrays", "images": IMAGES, "texts": list("abcde")}

    def words(**more):
        return [record["texts"][0] for record in build_source({**settings, **more})]
    assert words(subset=[1, 4]) == list("bcd") and words(limit=2) == list("ab") and words(limit=99) == list("abcde")
    assert words(subset=[-2, None]) == list("de") and words(subset=(1, None), limit=1) == ["b"]
    part = subset(letters(5, class_names=["x"]), 2, 5)
    assert part.describe(0) == "arrays[2]" and texts_of(part, 1) == ["d"] and part[-1]["texts"] == ["e"]
    with pytest.raises(IndexError):
        part[3]


def test_the_worlds_build_by_name():
    source = build_source({"name": "shapes", "split": "train", "limit": 2})
    assert len(source) == 2 and source[0]["image"].dtype == np.uint8 and texts_of(source, 0) == list(source[0]["texts"])


def test_a_mixture_keeps_its_weights_and_is_a_function_of_the_index():
    parts = [letters(3, "a"), letters(7, "A"), letters(10, "0")]
    mixture = MixtureSource(parts, [1, 2, 1], length=400)
    places = [mixture.locate(i) for i in range(400)]
    assert [sum(s == k for s, _ in places) for k in range(3)] == [100, 200, 100]
    assert all(abs(sum(s == 1 for s, _ in places[i:i + 8]) - 4) <= 1 for i in range(392)), "evenly spread"
    for k, part in enumerate(parts):                                 # every source is walked through in its order, again and again
        records = [r for s, r in places if s == k]
        assert records == [i % len(part) for i in range(len(records))]
    assert mixture.locate(317) == places[317] and texts_of(mixture, 5) == mixture[5]["texts"]
    assert mixture.describe(0).startswith("arrays[")


def test_one_pass_of_a_mixture_has_every_record():
    mixture = MixtureSource([letters(3), letters(17, "A")], [3, 1])
    seen = {mixture.locate(i) for i in range(len(mixture))}
    assert seen == {(0, i) for i in range(3)} | {(1, i) for i in range(17)}
    proportional = MixtureSource([letters(4), letters(8)])
    assert len(proportional) == 12 and len({proportional.locate(i) for i in range(12)}) == 12


def test_mixtures_from_a_config():
    arrays = {"name": "arrays", "images": IMAGES, "texts": list("abcde")}
    mixture = build_source({"name": "mixture", "sources": {"x": arrays, "y": {**arrays, "limit": 1}}, "weights": {"x": 3, "y": 1}})
    assert [mixture.locate(i)[0] for i in range(8)].count(1) == 2
    assert len(mixture_source([arrays, arrays])) == 10
    for bad in ({"x": 1}, [1, 2], {"x": 1, "y": 0}):
        with pytest.raises(ConfigError, match="weights"):
            mixture_source({"x": arrays, "y": arrays}, bad)
    with pytest.raises(ConfigError, match=r"mixture.sources\[y\]"):
        mixture_source({"x": arrays, "y": {"name": "nothing"}})


def test_parts_by_offset_pass_over_empty_ones():
    offsets = offsets_of([2, 0, 3])
    assert offsets == [0, 2, 2, 5] and [locate_part(offsets, i) for i in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
