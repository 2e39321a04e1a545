"""Objectives: what they say, that they can be inverted, and PaLI's shares."""
from collections import Counter
import pickle

from hypothesis import given, strategies as st
import numpy as np
import pytest

from vlm_jax.data.loader import Loader
from vlm_jax.data.locations import parse_detections
from vlm_jax.data.objectives import (
    OBJECTIVES,
    PALI_MIXTURE,
    corrupt,
    corrupt_text,
    noise_mask,
    objective_source,
    pali_mixture,
    restore,
    restore_text,
    split_text,
)
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import Source, build_source, prompt_of, texts_of
from vlm_jax.errors import ConfigError, DataError

BOXES = {"name": "shapes_captions", "size": 16, "count": 40, "objects": [2, 3]}


def make(objective, source=BOXES, **more):
    return build_source({"name": "objective", "objective": objective, "source": source, **more})


@given(st.text(), st.integers(0, 99))
def test_span_corruption_can_be_inverted(text, seed):
    text = " ".join(text.replace("<", "").split())
    if not text:
        with pytest.raises(DataError):
            corrupt_text(text, np.random.default_rng(seed))
        return
    inputs, target = corrupt_text(text, np.random.default_rng(seed))
    assert restore_text(inputs, target) == text and "<extra_id_0>" in inputs and target.startswith("<extra_id_0>")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=400), st.integers(0, 99), st.floats(0.05, 0.6), st.floats(1, 8))
def test_corrupted_items_come_back(items, seed, rate, mean):
    mask = noise_mask(len(items), np.random.default_rng(seed), rate, mean)
    sentinels = [f"s{k}" for k in range(300)]
    inputs, target = corrupt(items, mask, sentinels)
    assert restore(inputs, target, sentinels) == items and target[0] == "s0" and isinstance(target[-1], str)
    assert sum(isinstance(item, str) for item in target) == sum(isinstance(item, str) for item in inputs) + 1


def test_the_noise_is_t5s():
    masks = [noise_mask(600, np.random.default_rng(seed)) for seed in range(200)]
    assert {int(mask.sum()) for mask in masks} == {90}
    spans = [int((np.diff(np.concatenate([[0], mask.astype(int)])) == 1).sum()) for mask in masks]
    assert set(spans) == {30, 31} and noise_mask(1, np.random.default_rng(0)).all()     # 31 where a span is turned over the end
    share = np.mean(masks, axis=0)
    assert 0.03 < share.min() and share.max() < 0.3 and abs(share[:100].mean() - 0.15) < 0.02
    assert {noise_mask(5, np.random.default_rng(seed)).argmax() for seed in range(40)} == set(range(5))


def test_a_text_for_too_many_sentinels_is_an_error():
    with pytest.raises(DataError, match="all the sentinels") as error:
        corrupt_text("word " * 4000, np.random.default_rng(0))
    assert error.value.reason == "text_too_long"


def test_a_script_without_spaces_is_corrupted_by_characters():
    inputs, target = corrupt_text("月が綺麗ですねとても", np.random.default_rng(0))
    assert restore_text(inputs, target) == "月が綺麗ですねとても" and " " not in inputs + target


@given(st.text(min_size=1), st.integers(0, 99))
def test_split_captions_join(text, seed):
    if not text.split():
        return
    first, second, place = split_text(text, np.random.default_rng(seed))
    assert second and f"{first} {second}".split() == text.split() and len(first.split()) == place


@pytest.mark.parametrize("objective, prompt", [
    ("caption", "Generate the alt_text in en:"), ("split_caption", "Generate the alt_text in en at "), ("span_corruption", ""),
    ("vqa", "Answer in en: caption en"),
    ("question_generation", "Generate a question in en for a "), ("object_aware", "List the objects present, in en:"), ("detection", "detect "),
])
def test_every_objective_is_reproducible(objective, prompt):
    source, again = make(objective), make(objective)
    other = make(objective, seed=5)
    assert isinstance(source, Source) and len(source) == 40 and source.describe(3) == f"{objective} of shapes_captions/train[3]"
    for i in range(12):
        record, copy = source[i], pickle.loads(pickle.dumps(again))[i]  # noqa: S301  (our own bytes)
        assert record["prompt"].startswith(prompt) and record["texts"] == copy["texts"] == texts_of(source, i) and record["prompt"] == copy["prompt"]
        assert prompt_of(source, i) == record["prompt"] and record["objective"] == objective and all(text.strip() for text in record["texts"])
        assert (record["image"] is None) == (objective == "span_corruption") == bool(record.get("text_only"))
    if objective in ("split_caption", "span_corruption", "detection"):
        assert any(source[i]["prompt"] != other[i]["prompt"] or source[i]["texts"] != other[i]["texts"] for i in range(12))


def test_what_objectives_say():
    captions = build_source(BOXES)
    split, spans, lists, boxes = (make(name) for name in ("split_caption", "span_corruption", "object_aware", "detection"))
    for i in range(10):
        record, text = captions[i], captions[i]["texts"][0]
        assert f"{split[i]['prompt'].split(':', 1)[1]} {split[i]['texts'][0]}".split() == text.split()
        assert restore_text(spans[i]["prompt"], spans[i]["texts"][0]) == text
        assert lists[i]["texts"] == [", ".join(record["objects"])]
        found = parse_detections(boxes[i]["texts"][0], 16, 16)
        assert sorted(name for _, name in found) == sorted(record["objects"])
        for box, name in found:
            np.testing.assert_allclose(box, record["boxes"][record["objects"].index(name)], atol=16 / 1024)


def test_is_there():
    source = make("object_aware", settings={"candidates": ["red circle", "no such thing"], "list_share": 0.0}, source={**BOXES, "count": 300})
    answers = Counter()
    for i in range(300):
        record = source[i]
        name = record["prompt"].removeprefix("Is there a ").split(" in the image?")[0]
        assert record["texts"] == ["yes" if name in record["objects"] else "no"]
        answers[record["texts"][0]] += 1
    assert 110 < answers["yes"] < 190


def test_languages():
    records = {"texts": ["x"], "texts_by_language": {"en": "a moon", "de": "ein Mond"}, "image": None}
    rng = np.random.default_rng(0)
    told = {OBJECTIVES["caption"](records, rng)["language"] for _ in range(20)}
    assert told == {"en", "de"} and OBJECTIVES["caption"](records, rng, language="de") == {
        "prompt": "Generate the alt_text in de:", "texts": ["ein Mond"], "language": "de"}
    with pytest.raises(DataError, match="no caption in 'fr'"):
        OBJECTIVES["caption"](records, rng, language="fr")


def test_reading_screens():
    source = make("ocr", {"name": "screens", "count": 4})
    assert source[1]["texts"] == [" ".join(source[1]["ocr"])] and source[1]["prompt"] == "Generate the ocr_text in en:"


def test_palis_mixture_has_palis_shares():
    assert sum(PALI_MIXTURE.values()) == 1566 and set(PALI_MIXTURE) == set(OBJECTIVES)
    screens = {"name": "screens", "count": 8, "tasks": ["question"]}
    sources = {name: screens if name in ("ocr", "vqa", "question_generation") else BOXES for name in PALI_MIXTURE}
    mixture = build_source({"name": "pali_mixture", "sources": sources, "length": 783})
    shares = Counter(mixture.describe(i).split(" of ")[0] for i in range(783))
    assert {name: 2 * count for name, count in shares.items()} == PALI_MIXTURE
    assert pickle.loads(pickle.dumps(mixture))[5]["prompt"] == mixture[5]["prompt"] == prompt_of(mixture, 5)  # noqa: S301  (our own bytes)
    part = pali_mixture({"caption": BOXES, "detection": BOXES})
    assert Counter(part.describe(i).split(" of ")[0] for i in range(29)) == {"caption": 25, "detection": 4}


def test_the_mixture_becomes_batches_for_an_encoder_decoder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    mixture = pali_mixture({name: BOXES for name in PALI_MIXTURE if name != "ocr"}, length=60)
    tokenizer = {"train_on": BOXES, "vocab_size": 330, "added": ["<loc0000..1023>", "<extra_id_99..0>"]}
    processor = Processor([["resize", {"size": 8}], ["value_range", {"low": -1, "high": 1}]], [["tokenize", {"tokenizer": tokenizer}]],
                          {"kind": "encoder_decoder", "length": 120, "target_length": 60, "image_tokens": 4})
    loader = Loader(mixture, processor, 30, shuffle=False, threads=0, on_bad="raise")
    batch = next(loader.batches())
    alone = np.array(["span_corruption" in mixture.describe(i) for i in range(30)])
    assert batch["weight"].all() and alone.any() and not alone.all()
    np.testing.assert_array_equal((batch["slots"] >= 0).sum(1), np.where(alone, 0, 4))
    np.testing.assert_array_equal(np.abs(batch["images"]).sum((1, 2, 3, 4)) == 0, alone)
    for i in range(30):
        target = processor.decode(batch["targets"][i])
        assert target.replace("<", " <").split() == mixture[i]["texts"][0].replace("<", " <").split()
        if alone[i]:
            assert restore_text(processor.decode(batch["tokens"][i]), target) == restore_text(mixture[i]["prompt"], mixture[i]["texts"][0])


@pytest.mark.parametrize("settings, message", [
    (dict(objective="captions"), 'Did you mean "caption"'), (dict(settings={"rat": 1}), "settings.rat"), (dict(seed=-1), "seed"),
    (dict(source={"name": "nothing"}), "objective.source.name"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_source({"name": "objective", "objective": "span_corruption", "source": BOXES, **settings})


def test_wrong_mixtures():
    with pytest.raises(ConfigError, match="is empty"):
        pali_mixture({})
    with pytest.raises(ConfigError, match="pali_mixture.sources"):
        pali_mixture({"masking": BOXES})
    with pytest.raises(ConfigError, match="pali_mixture.settings"):
        pali_mixture({"caption": BOXES}, {"masking": {}})


@pytest.mark.parametrize("objective, record, reason", [
    ("ocr", {"texts": ["a"]}, "objective_missing"), ("ocr", {"ocr": []}, "objective_missing"), ("vqa", {"texts": ["a"]}, "objective_missing"),
    ("vqa", {"prompt": "a", "texts": []}, "caption_missing"), ("object_aware", {"objects": []}, "objective_missing"),
    ("detection", {"objects": ["a"], "boxes": np.zeros((2, 4))}, "objective_missing"), ("caption", {"texts": [" "]}, "caption_missing"),
])
def test_records_that_lack_something(objective, record, reason):
    with pytest.raises(DataError) as error:
        OBJECTIVES[objective](record, np.random.default_rng(0))
    assert error.value.reason == reason and "\n" not in str(error.value)


def test_a_source_object_is_taken_as_it_is():
    assert len(objective_source(build_source(BOXES), "caption")) == 40
