"""Captions, questions and boxes of the shapes world: true, balanced, and without held-out pairs in training."""
from collections import Counter, defaultdict
import pickle

import numpy as np
import pytest

from vlm_jax.data.locations import parse_detections
from vlm_jax.data.sources import Source, build_source, prompt_of, texts_of
from vlm_jax.data.worlds.shape_scenes import pair_name
from vlm_jax.data.worlds.shape_tasks import NUMBERS, QUESTIONS, answers
from vlm_jax.data.worlds.shapes import HELDOUT_PAIRS, TRAIN_PAIRS
from vlm_jax.errors import ConfigError

NAMES = ("shapes_captions", "shapes_questions", "shapes_boxes")
HELDOUT, TRAIN = ({pair_name(*pair) for pair in pairs} for pairs in (HELDOUT_PAIRS, TRAIN_PAIRS))


def make(name, split="train", **settings):
    return build_source({"name": name, "split": split, "size": 16, "count": 600, "objects": [1, 3], **settings})


@pytest.mark.parametrize("name", NAMES)
def test_every_record_is_reproducible(name):
    source, again = make(name), pickle.loads(pickle.dumps(make(name)))  # noqa: S301  (our own bytes)
    other = make(name, seed=1)
    assert isinstance(source, Source) and source.name == f"{name}/train" and source.describe(4) == f"{name}/train[4]" and source.details["task"] == name
    for i in range(8):
        record, copy = source[i], again[i]
        assert record["prompt"] == copy["prompt"] == prompt_of(source, i) and record["texts"] == copy["texts"] == texts_of(source, i)
        np.testing.assert_array_equal(record["image"], copy["image"])
    assert any(source[i]["texts"] != other[i]["texts"] for i in range(8)) and source[-1]["texts"] == source[599]["texts"]
    with pytest.raises(IndexError):
        source[600]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "validation", "heldout_pairs"])
def test_no_split_names_the_pairs_of_another(name, split):
    source = make(name, split)
    forbidden = TRAIN if split == "heldout_pairs" else HELDOUT
    said = {text for i in range(600) for text in (source.prompt_at(i), *(source.texts_at(i) if name != "shapes_boxes" or i < 60 else ()))}
    for text in said:
        words = text.replace("?", "").replace(",", "").split()
        assert not {" ".join(pair) for pair in zip(words, words[1:])} & forbidden
    assert all(set(source[i]["objects"]) <= (HELDOUT if split == "heldout_pairs" else TRAIN) for i in range(40))


def true_answers(kind, words, things):
    name = " ".join(words[-2:])
    if kind in ("color", "shape"):
        said, place = words[-1], " ".join(words[words.index("at") + 2:]) if "at" in words else None
        meant = [thing for thing in things if said == "it" or place == thing.place or said == (thing.shape if kind == "color" else thing.color)]
        return [getattr(thing, kind) for thing in meant]
    if kind == "place":
        return [thing.place for thing in things if thing.name == name]
    return [NUMBERS[len(things)]] if kind == "count" else ["yes" if name in {thing.name for thing in things} else "no"]


@pytest.mark.parametrize("objects", [1, (1, 3), (2, 4)])
def test_questions_are_true_and_answers_balanced(objects):
    source = make("shapes_questions", objects=objects, count=2500)
    counts, ways = defaultdict(Counter), Counter()
    for i in range(2500):
        things, question, answer = source.scenes.scene(i), source.prompt_at(i), source.texts_at(i)[0]
        words = question.rstrip("?").split()
        kind = {"what": "color" if "color" in words else "shape", "how": "count", "where": "place", "is": "exists"}[words[0]]
        right = true_answers(kind, words, things)
        assert right == [answer], (question, things)
        counts[kind][answer] += 1
        ways["it" if words[-1] == "it" else "place" if "at" in words else "name"] += kind in ("color", "shape")
    assert min(ways[way] for way in (("it", "name") if objects == 1 else ("place", "name"))) > 100 and (objects != 1 or not ways["place"])
    assert set(counts) == set(QUESTIONS)
    for kind, found in counts.items():
        assert set(found) <= set(answers()[kind])
        assert max(found.values()) < 1.7 * sum(found.values()) / len(found), (kind, found)
    assert min(sum(found.values()) for found in counts.values()) > 300


def test_kinds():
    assert {make("shapes_questions", kinds=["count"])[i]["task"] for i in range(5)} == {"count"}
    assert {make("shapes_boxes", kinds="refer").prompt_at(i).split()[0] for i in range(9)} == {"refer"}
    for settings, message in ((dict(kinds=["colour"]), 'Did you mean "color"'), (dict(kinds=[]), "is empty"), (dict(split="x"), "split"),
                              (dict(objects=9), "objects")):
        with pytest.raises(ConfigError, match=message):
            make("shapes_questions", **settings)


def test_captions():
    plain, all_of_them = make("shapes_captions", objects=1), make("shapes_captions", objects=1, variants=True)
    record = plain[3]
    assert record["prompt"] == "caption en" and record["texts"] == [f"a {record['objects'][0]}"] and len(all_of_them[3]["texts"]) == 5


def test_boxes_are_those_that_the_prompt_asks_for():
    source, kinds, phrases = make("shapes_boxes", size=48), Counter(), Counter()
    for i in range(150):
        record, things = source[i], source.scenes.scene(i)
        (box, name), = parse_detections(record["texts"][0], 48, 48)
        np.testing.assert_allclose(box, record["boxes"][0], atol=48 / 1024 + 1e-4)
        thing, = [thing for thing in things if thing.name == name]
        center = (box[:2] + box[2:]) / 2
        np.testing.assert_allclose(center, np.multiply((thing.x, thing.y), 48), atol=4)
        words = record["prompt"].split()
        kinds[words[0]] += 1
        if words[0] == "detect":
            assert record["prompt"] == f"detect {name}"
            continue
        phrase = record["phrase"]
        fitting = [t for t in things if phrase in (f"the {t.name}", f"the {t.color} shape", f"the {t.shape}", f"the shape at the {t.place}")]
        if "most" in phrase:
            fitting = [min(things, key=lambda t: t.x) if "left" in phrase else max(things, key=lambda t: t.x)]
        phrases[words[2] if "most" in phrase else "at" in words] += 1
        assert fitting == [thing], (phrase, things)
    assert min(kinds["detect"], kinds["refer"]) > 50 and len(phrases) == 4
