"""Captions, answers and boxes: metrics, lines that score again, the grid of answers; with answers that the test gives."""
import json

import numpy as np
import pytest

from tests.evaluation.stand_in import picture
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import evaluate
from vlm_jax.evaluation.answering import score_predictions


class Listed:
    name = "listed"

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def describe(self, index):
        return f"listed[{index}]"


class Answers:
    """A generator that says what the test says, by prompt and picture."""

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def answer(self, images, prompts, max_tokens, names):
        self.asked.append((None if images is None else [int(np.asarray(image)[0, 0, 0]) for image in images], list(prompts), max_tokens, list(names)))
        return self.texts


@pytest.fixture
def given(monkeypatch):
    """Records become the source of the evaluations."""
    def use(records):
        monkeypatch.setattr("vlm_jax.evaluation.records.build_source", lambda settings: Listed(records))
    return use


def run(tmp_path, evaluator, answers, **settings):
    """Evaluates and checks that the written lines give the same metrics."""
    generator = Answers(answers)
    metrics = evaluate("it", {"evaluator": evaluator, "source": {}, **settings}, generator, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    assert score_predictions(tmp_path / "predictions.jsonl") == pytest.approx(metrics)
    assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")
    return metrics, generator


def test_captions_are_scored_as_one_corpus(given, tmp_path):
    given([{"image": picture(i), "texts": texts} for i, texts in enumerate((["A cat sits on a mat.", "There is a cat on the mat"], ["two dogs run in a park",
           "Dogs running through the grass!"], ["a red bus on the street"]))])
    metrics, generator = run(tmp_path, "captioning", ["a cat on a mat", "a dog runs in the park", "a red bus on the street"], prompt="caption en", max_tokens=9)
    assert metrics["cider_d/tokenizer=ptb_like"] == pytest.approx(4.812028910788736) and metrics["pictures"] == 3
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    assert generator.asked == [([0, 1, 2], ["caption en"] * 3, 9, ["listed[0]", "listed[1]", "listed[2]"])]
    line = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert line["prediction"] == "a cat on a mat" and line["references"][1] == "There is a cat on the mat" and line["tokenizer"] == "ptb_like"


def test_captions_of_several_languages_are_corpora_of_their_own(given, tmp_path):
    texts = {"de": ["roter Bus", "gr\u00fcne Katze"], "zh": ["\u7ea2\u8272\u5df4\u58eb", "\u7eff\u8272\u7684\u732b"]}
    given([{"image": picture(i), "prompt": f"caption {language}", "texts": [text], "language": language}
           for language in texts for i, text in enumerate(texts[language])])
    metrics, generator = run(tmp_path, "captioning", [*texts["de"], "\u7ea2\u8272\u5df4\u58eb", "\u72d7"], metrics=["cider_d", "bleu_1"])
    assert generator.asked[0][1] == ["caption de"] * 2 + ["caption zh"] * 2
    # Two words have no sequences of three; of four characters one caption is right and one is not.
    assert metrics["cider_d/de/tokenizer=ptb_like"] == pytest.approx(5) and metrics["cider_d/zh/tokenizer=characters"] == pytest.approx(5)
    assert metrics["cider_d/mean_of_languages"] == pytest.approx(5) and metrics["exact_match/zh"] == 0.5
    assert "bleu_2/de/tokenizer=ptb_like" not in metrics and metrics["exact_match/de"] == 1.0 and metrics["exact_match"] == 0.75


def test_answers_are_scored_by_task(given, tmp_path):
    given([{"image": picture(i), "prompt": f"question {i}", "texts": [text], "task": task}
           for i, (text, task) in enumerate((("red", "color"), ("two", "count"), ("blue", "color")))])
    metrics, generator = run(tmp_path, "vqa", ["Red", "three", "green"], metrics=["exact_match", "anls"], images=False)
    assert metrics["exact_match"] == pytest.approx(1 / 3) and metrics["exact_match/color"] == 0.5 and metrics["exact_match/count"] == 0
    assert metrics["anls/color"] == 0.5 and generator.asked[0][0] is None


def test_answers_of_several_people_and_yes_or_no(given, tmp_path):
    given([{"image": picture(i), "prompt": "?", "texts": ["two"] * 10} for i in range(2)])
    metrics, _ = run(tmp_path / "vqa", "vqa", ["2", "two"], metrics=["vqa_accuracy/official", "vqa_accuracy/lenient"])
    assert metrics["vqa_accuracy/official"] == 0.0 and metrics["vqa_accuracy/lenient"] == 1.0
    given([{"image": picture(i), "prompt": "?", "texts": [text], "split": split} for i, (text, split) in enumerate((("yes", "random"), ("no", "popular")))])
    metrics, _ = run(tmp_path / "pope", "vqa", ["Yes, it is.", "perhaps"], metrics=["pope"])
    assert metrics["pope/accuracy"] == 0.5 and metrics["pope/unparsed/popular"] == 1.0 and metrics["pope/f1/random"] == 1.0


def test_boxes_are_scored_by_their_overlap(given, tmp_path):
    target = "<loc0000><loc0000><loc0512><loc0512> red circle"
    given([{"image": picture(i), "prompt": "detect red circle", "texts": [target], "task": task} for i, task in enumerate(("detect", "detect", "refer"))])
    metrics, _ = run(tmp_path, "grounding", [target, "<loc0000><loc0000><loc0200><loc0512>", "no idea"])
    assert metrics["iou@0.5"] == pytest.approx(1 / 3) and metrics["iou@0.5/detect"] == 0.5 and metrics["unparsed"] == pytest.approx(1 / 3)
    assert metrics["mean_iou/refer"] == 0.0


def test_what_cannot_be_evaluated_is_named(given, tmp_path):
    given([{"image": picture(0), "texts": ["a"]}, {"image": picture(1), "texts": []}])
    with pytest.raises(DataError, match=r"evaluations.it: listed\[1\]: it has no list of texts"):
        run(tmp_path, "captioning", ["a", "b"])
    with pytest.raises(ConfigError, match='Did you mean "exact_match"'):
        run(tmp_path, "vqa", [], metrics=["exact_mach"])
    with pytest.raises(ConfigError, match="threshold is 2"):
        run(tmp_path, "grounding", [], threshold=2)
    given([{"image": picture(0), "texts": ["a"]}])
    with pytest.raises(DataError, match="holds no box"):
        run(tmp_path, "grounding", ["a"])
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(DataError, match="no predictions"):
        score_predictions(tmp_path / "predictions.jsonl")
