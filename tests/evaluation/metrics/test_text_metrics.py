"""Metrics of text against the numbers that their reference programs gave, and the cases in which those programs differ."""
import math

import pytest

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import metrics as m
from vlm_jax.evaluation.metrics.answers import edit_distance
from vlm_jax.evaluation.metrics.tokens import characters, tokenizer_of
from vlm_jax.evaluation.metrics.vqa import CONTRACTIONS, normalize

REFERENCES = [["a cat sits on a mat", "there is a cat on the mat"], ["two dogs run in a park", "dogs running through the grass"], ["a red bus on the street"]]
PREDICTIONS = ["a cat on a mat", "a dog runs in the park", "a red bus on the street"]
WORDS, SETS = [text.split() for text in PREDICTIONS], [[text.split() for text in texts] for texts in REFERENCES]


def test_captions_equal_the_coco_server():
    """Numbers of pycocoevalcap 1.2 on this corpus."""
    assert m.bleu(WORDS, SETS) == pytest.approx([.8319468915387782, .7101198806936743, .6377126881341475, .5502878535853116], abs=1e-12)
    mean, each = m.rouge_l(WORDS, SETS)
    assert mean == pytest.approx(.7425871619420006, abs=1e-12) and each == pytest.approx([.89442815, .33333333, 1.0], abs=1e-8)
    mean, each = m.cider_d(WORDS, SETS)
    assert mean == pytest.approx(4.812028910788736, abs=1e-12) and each == pytest.approx([3.87706974, .55901699, 10.0], abs=1e-8)
    scores = m.caption_scores(PREDICTIONS, REFERENCES)
    assert scores["cider_d/tokenizer=ptb_like"] == pytest.approx(mean, abs=1e-12) and len(scores) == 6


def test_caption_scores_at_the_edges():
    assert m.cider_d([WORDS[0]], [SETS[0]])[0] == 0.0          # the logarithm of one document is 0
    assert m.rouge_l([[]], [SETS[0]])[0] == 0.0 and max(m.bleu([[]], [SETS[0]])) < 1e-6
    shorter = m.bleu([["a", "cat"]], [[["a", "cat", "sits", "here"]]])[0]
    assert shorter == pytest.approx(math.exp(1 - 4 / 2), rel=1e-6)
    assert m.bleu([["a"] * 3], [[["a"] * 2, ["a"] * 4]])[0] == pytest.approx(1.0, rel=1e-6)      # 2 and 4 are equally close: no penalty
    for metric in ("meteor", "spice"):
        with pytest.raises(ConfigError, match="Java"):
            m.caption_scores(PREDICTIONS, REFERENCES, metrics=[metric])
    for references, message in (([], "3 predictions for 0"), ([["a"], [], ["b"]], "picture 1 has no"), ([["a"], ["b"], "c"], "picture 2 has no")):
        with pytest.raises(DataError, match=message):
            m.caption_scores(PREDICTIONS, references)


@pytest.mark.parametrize("text, words", [
    ("A dog's t-shirt, isn't it?", "a dog 's t-shirt is n't it"), ("They're at the u.s. mail...", "they 're at the u.s. mail"),
    ("3.5 of 1,000 (ten) dogs; at 10:30!", "3.5 of 1,000 ten dogs at 10:30"), ("I cannot -- \"see\" it.", "i can not see it"),
    ("Man\u2019s hat \u2014 red", "man 's hat red"), ("A man.", "a man"), ("", ""), ("-", ""), ("Stra\u00dfe caf\u00e9", "stra\u00dfe caf\u00e9"),
])
def test_words_are_split_as_in_the_treebank(text, words):
    assert m.ptb_like(text) == words.split()


def test_languages_without_blanks_are_scored_by_character():
    assert characters("\u732b \u3068\u3001\u72ac!") == ["\u732b", "\u3068", "\u72ac"]
    assert characters("\u0e19\u0e49\u0e33") == ["\u0e19\u0e49", "\u0e33"]
    assert [tokenizer_of(language) for language in (None, "de", "zh", "zh-Hant", "ja", "th")] == ["ptb_like"] * 2 + ["characters"] * 4


@pytest.mark.parametrize("prediction, answers, official, paligemma, lenient, molmo", [
    ("yes", ["yes"] * 3 + ["no"] * 7, .9, .9, .9, 1), ("u.s. mail", ["u.s. mail"] * 10, 0, 1, 1, 1), ("the end", ["the end"] * 10, 0, 1, 1, 1),
    ("the end", ["the end"] * 9 + ["end"], .3, 1, 1, 1), ("Cat.", ["cat"] * 10, 1, 0, 1, 1), ("two", ["2"] * 10, 1, 0, 1, 1), ("2", ["two"] * 10, 0, 0, 1, 1),
])
def test_vqa_accuracy_differs_as_measured(prediction, answers, official, paligemma, lenient, molmo):
    for variant, expected in dict(official=official, paligemma=paligemma, lenient=lenient, molmo=molmo).items():
        assert m.vqa_accuracy(prediction, answers, variant) == pytest.approx(expected), variant
    assert m.vqa_accuracy(prediction, answers, "simple") == min(1, answers.count(prediction) / 3)


def test_vqa_counts_matches_by_leaving_one_out():
    for matches, score in enumerate((0, .3, .6, .9, 1, 1, 1, 1, 1, 1, 1)):
        assert m.vqa_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(score)
    with pytest.raises(ConfigError, match="offical.*official"):
        m.vqa_accuracy("a", ["a"] * 10, "offical")
    with pytest.raises(DataError, match="several people"):
        m.vqa_accuracy("a", ["a"])


@pytest.mark.parametrize("text, normal", [
    ("black-and-white", "black and white"), ("black - white", "black white"), ("1,000", "1000"), ("1,000 a-b", "1000 ab"), ("3.5", "3.5"), ("dont", "don't"),
    ("A dog, an owl", "dog owl"), ("None", "0"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("im", "im"), ("somebody'd", "somebodyd"),
])
def test_answers_are_normalised_as_in_the_challenge(text, normal):
    assert normalize(text) == normal


def test_contractions_are_those_of_the_challenge():
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've" and "well" not in CONTRACTIONS


def test_anls_is_strict():
    assert m.anls("abxx", ["abcd"]) == 0.0 and m.anls("abcx", ["abcd"]) == 0.75 and m.anls(" ABCD  e", ["abcd e", "zz"]) == 1.0
    assert m.anls("dog        ", ["cat"]) == 0.0 and m.anls("", [""]) == 1.0 and m.anls("", ["a"]) == 0.0
    assert edit_distance("kitten", "sitting") == 3 == edit_distance("sitting", "kitten")


@pytest.mark.parametrize("prediction, answer, right", [
    ("104.9", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("10%", "0.1", 1), ("0.0", "0", 0), ("0", "0", 1), ("Blue", "blue ", 1), ("blue", "red", 0),
    ("nan", "nan", 1), ("inf", "3", 0), ("1e400", "3", 0), ("1,000", "1000", 0),
])
def test_relaxed_accuracy(prediction, answer, right):
    assert m.relaxed_accuracy(prediction, ["other", answer]) == right


def test_pope_reads_answers_as_published_and_counts_what_it_cannot_read():
    found = m.pope(["Yes, there is a dog.", "Yes", "No.", "no"], ["yes", "yes", "no", "no"])
    assert found == dict(accuracy=1.0, precision=1.0, recall=1.0, f1=1.0, yes_ratio=0.5, unparsed=0.0)
    found = m.pope(["NO", "none", "maybe", ""], ["no", "no", "yes", "no"])
    assert found["yes_ratio"] == 1.0 and found["accuracy"] == 0.25 and found["unparsed"] == 0.75
    always = m.pope(["yes"] * 4, ["yes", "no", "no", "no"])
    assert always["yes_ratio"] == 1.0 and always["precision"] == 0.25 and always["f1"] == pytest.approx(0.4)
    assert m.pope(["no"], ["yes"])["f1"] == 0.0
    splits = m.pope_splits(["yes", "no", "no"], ["yes", "no", "yes"], ["random", "random", "popular"])
    assert splits["accuracy/random"] == 1.0 and splits["accuracy/popular"] == 0.0 and splits["accuracy"] == 0.5
    with pytest.raises(DataError, match="question 0 is 'maybe'"):
        m.pope(["yes"], ["maybe"])


def test_boxes_are_read_and_compared():
    box = (0.25, 0.5, 0.75, 1023 / 1024)
    assert m.parse_boxes(m.box_text(box) + " red circle") == [box] and m.box_text((0, 0.5, 1.0, 2.0)) == "<loc0000><loc0512><loc1023><loc1023>"
    assert m.parse_boxes("<loc0001><loc0002><loc0003>") == [] == m.parse_boxes("<loc0500><loc0000><loc0400><loc0100>")     # three; upside down
    assert m.parse_boxes("<loc1024><loc0000><loc0400><loc0100>") == [] and len(m.parse_boxes("<loc0000><loc0000><loc0010><loc0010> a ; " * 2)) == 2
    assert m.iou((0, 0, 1, 1), (0, 0, 0.5, 1)) == 0.5 and m.iou((0, 0, 1, 1), (0.5, 0.5, 0.5, 0.9)) == 0.0 and m.iou((0, 0, .1, .1), (.5, .5, 1, 1)) == 0.0


def test_referring_counts_every_expression():
    target = "<loc0000><loc0000><loc0512><loc0512>"
    scores, overlaps = m.referring([target, "<loc0000><loc0000><loc0256><loc0512> box", "nothing", "<loc0600><loc0600><loc0700><loc0700>"], [target] * 4)
    assert overlaps == [1.0, 0.5, 0.0, 0.0] and scores == {"iou@0.5": 0.5, "mean_iou": 0.375, "unparsed": 0.25}
    with pytest.raises(DataError, match="expression 0 holds no box"):
        m.referring(["a"], ["a"])


def test_exact_match_and_the_table_of_answer_metrics():
    assert m.exact_match(" Two  cats", ["two cats"]) == 1.0 and m.exact_match("two", ["two cats"]) == 0.0
    assert {"exact_match", "anls", "relaxed_accuracy", "vqa_accuracy/official"} <= set(m.ANSWER_METRICS)
    assert m.ANSWER_METRICS["vqa_accuracy/lenient"]("2", ["two"] * 10) == 1.0
