"""Recall against brute force; ties, groups, several captions, languages; predictions that can be scored again."""
import json

from hypothesis import given, strategies as st
import numpy as np
import pytest

from tests.evaluation.stand_in import StandIn, picture
from vlm_jax import evaluation
from vlm_jax.data import sources
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import retrieval


class Records:
    """A source of given records."""

    def __init__(self, records):
        self.records, self.name = records, "given"

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return {"image": picture(index), **self.records[index]}

    def describe(self, index):
        return f"given[{index}]"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Evaluates records with given embeddings."""
    def evaluate(records, images, texts, **settings):
        monkeypatch.setattr("vlm_jax.evaluation.records.build_source", lambda settings: Records(records))
        return evaluation.evaluate("search", {"evaluator": "retrieval", "source": {"name": "given"}, **settings}, StandIn(images, texts), tmp_path)
    return evaluate


def records_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def unit(rng, *shape):
    values = rng.normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@given(st.integers(2, 23), st.integers(1, 3), st.integers(0, 1000))
def test_ranks_equal_brute_force(pictures, per_picture, seed):
    rng = np.random.default_rng(seed)
    # Few distinct directions, so that ties are common.
    table = unit(rng, 4, 3)
    images, texts = table[rng.integers(4, size=pictures)], table[rng.integers(4, size=pictures * per_picture)]
    owner = np.repeat(np.arange(pictures), per_picture)
    right = owner[:, None] == np.arange(pictures)[None]
    ranks, best = retrieval.rank(texts, images, lambda start, stop: right[start:stop])
    for query in range(len(texts)):
        scores = [float(texts[query] @ image) for image in images]
        target = max(score for score, correct in zip(scores, right[query]) if correct)
        wrong = [score for score, correct in zip(scores, right[query]) if not correct]
        assert ranks[query] == 1 + sum(score >= target - 1e-12 for score in wrong)
        hits = [place for place, (_, _, hit) in enumerate(best[query], 1) if hit]
        assert (hits[0] if hits else 11) == min(ranks[query], 11)


def test_blocks_do_not_change_ranks(monkeypatch):
    rng = np.random.default_rng(0)
    queries, answers = unit(rng, 31, 5), unit(rng, 17, 5)
    right = np.arange(31)[:, None] % 17 == np.arange(17)[None]
    whole, _ = retrieval.rank(queries, answers, lambda start, stop: right[start:stop])
    monkeypatch.setattr(retrieval, "BLOCK", 40)
    np.testing.assert_array_equal(retrieval.rank(queries, answers, lambda start, stop: right[start:stop])[0], whole)


def test_a_model_that_answers_the_same_to_everything_scores_nothing(run):
    """Pessimistic ties: constant embeddings are not rewarded."""
    records = [{"texts": [f"t{i}"]} for i in range(12)]
    metrics = run(records, np.ones((12, 2)) / 2 ** 0.5, {f"t{i}": [0.5 ** 0.5] * 2 for i in range(12)})
    assert metrics["text_to_image/r@1"] == metrics["image_to_text/r@10"] == 0
    assert metrics["text_to_image/median_rank"] == 12


def test_any_of_several_captions_counts_and_equal_texts_are_one_query(run):
    records = [{"texts": ["a", "shared"]}, {"texts": ["b", "shared"]}]
    texts = {"a": [0, 1], "b": [0, 1], "shared": [1, 0]}   # "a" and "b" are far from their pictures, "shared" is on both
    metrics = run(records, [[1, 0], [1, 0]], texts)
    assert metrics["image_to_text/r@1"] == 1
    assert metrics["text_to_image/r@1"] == pytest.approx(1 / 3)   # "shared" is right whichever picture comes first; "a" and "b" tie and count against


def test_records_of_one_group_are_right_for_each_other(run):
    records = [{"texts": ["x"], "group": 7}, {"texts": ["y"], "group": 7}, {"texts": ["z"], "group": 8}]
    images = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    metrics = run(records, images, {"x": [0, 1, 0], "y": [1, 0, 0], "z": [0, 0, 1]})
    assert metrics["text_to_image/r@1"] == metrics["image_to_text/r@1"] == 1


def test_languages_have_a_metric_each_and_the_plain_one_is_their_mean(run):
    records = [{"texts_by_language": {"en": [f"e{i}"], "de": [f"d{i}"]}} for i in range(4)]
    texts = {**{f"e{i}": np.eye(4)[i] for i in range(4)}, **{f"d{i}": np.eye(4)[(i + 1) % 4] for i in range(4)}}
    metrics = run(records, np.eye(4), texts, languages=["en", "de"])
    assert metrics["text_to_image/r@1/en"] == 1 and metrics["text_to_image/r@1/de"] == 0
    assert metrics["text_to_image/r@1"] == 0.5


def test_a_language_may_hold_a_string_or_a_list(run, tmp_path):
    """As the records of emoji do: one string a language. Read as a list it would be as many queries as it has letters."""
    records = [{"texts_by_language": {"en": f"one text {i}", "de": [f"Satz {i}", f"Text {i}"]}} for i in range(4)]
    texts = {**{f"one text {i}": np.eye(4)[i] for i in range(4)}, **{f"{word} {i}": np.eye(4)[i] for word in ("Satz", "Text") for i in range(4)}}
    metrics = run(records, np.eye(4), texts, languages=["en", "de"])
    assert metrics["text_to_image/r@1/en"] == metrics["text_to_image/r@1/de"] == 1
    lines = records_of(tmp_path)
    asked = [line["query"]["text"] for line in lines if line["direction"] == "text_to_image" and line["language"] == "en"]
    assert asked == [f"one text {i}" for i in range(4)]
    again = retrieval.score_predictions(tmp_path / "predictions.jsonl")
    assert again["text_to_image/r@1"] == metrics["text_to_image/r@1"] and all(metrics[name] == pytest.approx(value) for name, value in again.items())


def test_a_picture_without_a_text_in_a_language_is_an_answer_but_no_query(run, tmp_path):
    records = [{"texts_by_language": {"en": "a", "de": "x"}}, {"texts_by_language": {"en": "b"}}, {"texts_by_language": {"en": "c", "de": "z"}}]
    texts = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1], "x": [0, 1, 0], "z": [0, 0, 1]}     # "x" lies on the picture without a German text
    metrics = run(records, np.eye(3), texts, languages=["en", "de"])
    assert metrics["text_to_image/r@1/de"] == 0.5 and metrics["image_to_text/r@1/en"] == 1
    queries = [line["query"]["index"] for line in records_of(tmp_path) if line["direction"] == "image_to_text" and line["language"] == "de"]
    assert queries == [0, 2]
    assert metrics["image_to_text/r@1/de"] == 0.5    # picture 0 ties between "x" and "z", and a tie counts against


def test_predictions_score_again(run, tmp_path):
    rng = np.random.default_rng(3)
    records = [{"texts": [f"t{i}", f"u{i}"]} for i in range(30)]
    metrics = run(records, unit(rng, 30, 6), {f"{kind}{i}": unit(rng, 6) for kind in "tu" for i in range(30)})
    again = retrieval.score_predictions(tmp_path / "predictions.jsonl")
    assert again and all(metrics[name] == pytest.approx(value) for name, value in again.items())
    assert 0 < metrics["text_to_image/r@10"] < 1
    for name in ("text_to_image.png", "image_to_text.png", "recall_curve.png", "metrics.json"):
        assert 0 < (tmp_path / name).stat().st_size < 300_000


def test_unreadable_records_are_left_out_and_said(run, capsys):
    records = [{"texts": ["a"]}, {"texts": ["b"], "image": b"no picture"}, {"texts": ["c"]}]
    metrics = run(records, np.eye(3), {"a": [1, 0, 0], "c": [0, 0, 1]})
    assert metrics["pictures"] == 2 and metrics["text_to_image/r@1"] == 1
    assert "1 of 3 records" in capsys.readouterr().out


def test_errors_name_the_evaluation(run):
    with pytest.raises(DataError, match="evaluations.search: given: no record has a text"):
        run([{"texts": []}], np.eye(1), {})
    with pytest.raises(ConfigError, match="texts_by_language"):
        run([{"texts": ["a"]}], np.eye(1), {"a": [1]}, languages=["de"])
    with pytest.raises(ConfigError, match=r"evaluations.search.langauges.*Did you mean \"languages\""):
        run([{"texts": ["a"]}], np.eye(1), {"a": [1]}, langauges=["de"])


def test_real_source_is_read(tmp_path):
    data = sources.build_source({"name": "shapes", "split": "validation", "size": 16, "limit": 5})
    assert len(data) == 5
