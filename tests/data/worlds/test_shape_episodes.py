"""Episodes on the shapes world: what the examples say, what evaluation holds out, and the controls that break the tie."""
import pickle

import numpy as np
import pytest

from vlm_jax.data.documents import check_segments
from vlm_jax.data.sources import Source, build_source, prompt_of, texts_of
from vlm_jax.data.worlds.invented_words import SPLITS, words
from vlm_jax.data.worlds.shape_episodes import ANSWERS, LEVELS, PAIRS, caption_styles, concepts, described, episodes_source, words_source
from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES
from vlm_jax.errors import ConfigError


def said(record):
    return [segment.get("text", "IMAGE") for segment in record["segments"]]


def test_words_concepts_and_styles_of_the_splits_are_disjoint():
    for syllables, least in ((1, 1000), (2, 50_000)):
        pools = [set(words(split, syllables)) for split in SPLITS]
        assert not pools[0] & pools[1] and not pools[0] & pools[2] and not pools[1] & pools[2] and len(pools[0]) > least
    assert not {"red", "top", *COLORS, *SHAPES} & set().union(*(words(split) for split in SPLITS))
    for level, count in zip(LEVELS, (100, 10, 10)):
        known = [set(concepts(split, level)) for split in SPLITS]
        assert sum(map(len, known)) == len(set().union(*known)) == count and min(map(len, known)) >= 2
    assert sum(len(caption_styles(split)) for split in SPLITS) == 108 == len({style for split in SPLITS for style in caption_styles(split)})
    assert min(len(caption_styles(split)) for split in SPLITS) >= 5


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_of_another_split_is_in_an_episode(split):
    source = episodes_source(split, shots=(0, 5), levels=LEVELS, control=None)
    pairs = {(list(COLORS)[color], SHAPES[shape]) for color, shape in PAIRS[split]}
    seen = set()
    for i in range(150):
        plan = source.plan(i)
        seen.add((plan.task, plan.style if plan.task != "caption" else ""))
        assert all((one.thing.color, one.thing.shape) in pairs for one in (*plan.support, plan.query))
        if plan.task == "binding":
            assert set(plan.candidates) <= set(words(split)) and plan.query.answer in plan.candidates
        elif plan.task == "vqa":
            assert plan.query.answer in ANSWERS[plan.style] and set(plan.candidates) == {answer for known in ANSWERS.values() for answer in known}
        else:
            assert plan.style in {mark.join(order) for order, mark in caption_styles(split)} and plan.query.answer == plan.candidates[0]
            assert len(set(plan.candidates)) == len(plan.candidates) > 6
    assert seen == {("binding", level) for level in LEVELS} | {("vqa", name) for name in ANSWERS} | {("caption", "")}


def test_a_word_means_one_concept_and_every_concept_comes_once_a_round():
    source = episodes_source("train", kinds=("binding",), shots=(6, 9), ways=(2, 4), levels=LEVELS)
    for i in range(60):
        plan = source.plan(i)
        named = {}
        for example in (*plan.support, plan.query):
            parts = {"pair": example.thing.name, "color": example.thing.color, "shape": example.thing.shape}
            named.setdefault(example.answer, set()).add(parts[plan.style])
        assert all(len(meanings) == 1 for meanings in named.values()) and len({*map(frozenset, named.values())}) == len(named)
        ways, answers = len(plan.candidates), [example.answer for example in plan.support]
        assert set(answers[:ways]) == set(plan.candidates) and 6 <= len(answers) <= 9
    asked = [source.plan(i).candidates.index(source.plan(i).query.answer) for i in range(200)]
    assert set(asked) == {0, 1, 2, 3} and asked.count(0) < 120


def test_a_record_is_a_document_and_its_parts():
    source = build_source({"name": "shapes_episodes", "split": "heldout", "kinds": ["binding"], "shots": 3, "repeats": 2, "induction": True, "count": 9})
    record = source[4]
    assert isinstance(source, Source) and len(source) == 9 and [*record["opening"]] and len(record["support"]) == 3
    whole = [*record["opening"], *(s for example in record["support"] for _ in range(2) for s in example), *record["query"]]
    assert record["segments"][:-1] == whole and record["segments"][-1] == {"kind": "text", "text": record["texts"][0], "loss": True}
    assert check_segments(record["segments"], "<image>") and record["image"] is record["query"][0]["image"] and record["image"].shape == (32, 32, 3)
    assert said(record)[0] == f"answer with {' or '.join(record['candidates'])}."
    losses = [segment["loss"] for segment in record["segments"] if segment["kind"] == "text" and segment["text"] in record["candidates"]]
    assert all(losses) and sum(s.get("loss", False) for s in record["segments"]) == len(losses) == 7
    outline = source.outline_at(4)["segments"]
    assert [s if s["kind"] == "text" else "IMAGE" for s in outline] == [s if s["kind"] == "text" else "IMAGE" for s in record["segments"]]
    assert texts_of(source, 4) == record["texts"] and prompt_of(source, 4) == record["prompt"] == "this is a"
    again = pickle.loads(pickle.dumps(source))[4]  # noqa: S301  (our own bytes)
    assert said(again) == said(record) and np.array_equal(again["image"], record["image"]) and not np.array_equal(source[5]["image"], record["image"])
    assert source.describe(4) == "shapes_episodes/heldout[4]" and source.details["shots"] == [3, 3]
    for loss, count in (("query", 1), ("all", 4 + 4)):
        counted = episodes_source("heldout", kinds="binding", shots=3, loss=loss)[0]["segments"]
        assert sum(segment.get("loss", False) for segment in counted) == count


@pytest.mark.parametrize("kind", ["binding", "vqa", "caption"])
def test_more_shots_are_more_of_the_same_episode(kind):
    few, many = (episodes_source("heldout", kinds=(kind,), shots=shots, ways=3) for shots in (2, 7))
    for i in range(5):
        one, other = few[i], many[i]
        assert one["texts"] == other["texts"] and one["candidates"] == other["candidates"] and np.array_equal(one["image"], other["image"])
        assert [s.get("text") for e in one["support"] for s in e] == [s.get("text") for e in other["support"][:2] for s in e]
        assert all(np.array_equal(a[0]["image"], b[0]["image"]) for a, b in zip(one["support"], other["support"]))
    none = episodes_source("heldout", kinds=(kind,), shots=0, ways=3)[0]
    assert none["support"] == [] and none["segments"][:-1] == none["query"] and none["texts"] == few[0]["texts"]


def test_controls_break_the_tie_of_pictures_and_answers():
    plain, permuted, others = (episodes_source("heldout", kinds=("binding",), shots=8, ways=4, control=control) for control in (None, "permuted", "others"))
    right = {"permuted": 0, "others": 0}
    for i in range(40):
        plan = plain.plan(i)
        meaning = {example.answer: example.thing.name for example in plan.support}
        for name, source in (("permuted", permuted), ("others", others)):
            broken = source.plan(i)
            assert [example.answer for example in broken.support] == [example.answer for example in plan.support] and broken.query == plan.query
            right[name] += sum(meaning[example.answer] == example.thing.name for example in broken.support)
        moved = permuted.plan(i)
        assert sorted(e.thing.x for e in moved.support) == sorted(e.thing.x for e in plan.support)
        assert all(a.thing != b.thing for a, b in zip(moved.support, plan.support))
    assert right["permuted"] / 320 < 0.35 and right["others"] / 320 < 0.2           # 1 of 4, 1 of 20


def test_a_bank_of_pictures():
    source = episodes_source("heldout", shots=(2, 6), bank=2, levels=("pair",))
    seen = {}
    for i in range(60):
        record, plan = source[i], source.plan(i)
        for example, shown in zip((*plan.support, plan.query), (*record["support"], record["query"])):
            same = seen.setdefault(example.banked, (example.thing, shown[0]["image"]))
            assert same[0] == example.thing and same[1] is shown[0]["image"] and not same[1].flags.writeable
        if plan.task == "binding":
            assert len({(e.answer, e.thing.name) for e in plan.support}) == len({e.answer for e in plan.support})
    assert 20 < len(seen) <= 20 * 2 * 2
    assert episodes_source("heldout", bank=2, control="permuted", shots=3).plan(5).query == episodes_source("heldout", bank=2, shots=3).plan(5).query


def test_the_text_side():
    hidden, told = (episodes_source("train", shots=2, images=images) for images in (False, "described"))
    for i in range(12):
        record, plan = told[i], hidden.plan(i)
        assert record["text_only"] and "image" not in record and all(s["kind"] == "text" for s in record["segments"])
        shown = [s["text"] for s in record["segments"]][::3]
        assert shown == [f"{described(e.thing)}:" for e in (*plan.support, plan.query)]
        assert [t for place, t in enumerate(said(record)) if place % 3] == said(hidden[i])
    for kind in ("description", "question", "episode", "names"):
        texts = build_source({"name": "shapes_texts", "kinds": [kind], "count": 50, "episodes": {"shots": [2, 4]}})
        record = texts[3]
        assert record["text_only"] and record["task"] == kind and len(record["texts"][0].split()) > 2
        assert texts[3] == record and texts.texts_at(3) == record["texts"]
        written = " ".join(texts[i]["texts"][0] for i in range(50))
        assert not any(f" {name} " in f" {written} " for name in concepts("heldout", "pair")) and not set(words("heldout")) & set(written.split())
    with pytest.raises(ConfigError, match="episodes.split"):
        build_source({"name": "shapes_texts", "episodes": {"split": "train"}})


def test_words_of_one_lexicon():
    queries, support = (words_source("heldout", 300, seed=seed, ways=6) for seed in (1, 2))
    assert queries.words == support.words and len(set(queries.words)) == 6 and set(queries.words) <= set(words("heldout"))
    meaning = {}
    for source in (queries, support):
        for i in range(30):
            record = source[i]
            meaning.setdefault(record["texts"][0], set()).add(record["concept"])
            assert record["candidates"] == queries.words and record["candidates"][record["label"]] == record["texts"][0] == source.texts_at(i)[0]
            assert record["concept"] == f"{record['attributes']['color']} {record['attributes']['shape']}" in concepts("heldout", "pair")
    assert all(len(names) == 1 for names in meaning.values()) and len(meaning) == 6
    assert words_source(lexicon=1).words != words_source().words and not np.array_equal(queries[0]["image"], support[0]["image"])
    assert isinstance(build_source({"name": "shapes_words", "limit": 3}), Source)


@pytest.mark.parametrize("wrong, message", [
    (dict(split="test"), "split"), (dict(kinds=["bind"]), 'Did you mean "binding"'), (dict(kinds=[]), "empty"), (dict(shots=-1), "shots"),
    (dict(shots=(3, 2)), "shots"), (dict(ways=1), "ways"), (dict(split="heldout", ways=3, levels=["color"]), "has 2 concepts"), (dict(size=4), "size"),
    (dict(control="shuffled"), "control"), (dict(loss="none"), "loss"), (dict(repeats=0), "repeats"), (dict(images="drawn"), "images"), (dict(bank=0), "bank"),
    (dict(syllables=3), "syllables"),
])
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        episodes_source(**wrong)
