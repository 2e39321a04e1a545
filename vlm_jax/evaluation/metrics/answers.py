"""Scores of short answers: exact match, ANLS (documents), relaxed accuracy (charts), POPE (yes or no)."""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
import math
import re

from vlm_jax.errors import DataError
from vlm_jax.evaluation.metrics.vqa import VQA_VARIANTS, vqa_accuracy

ANLS_LIMIT, RELAXED = 0.5, 0.05
Answers = Sequence[str]


def exact_match(prediction: str, answers: Answers) -> float:
    """1 if the prediction is one of the answers, in any case, runs of blanks counting as one."""
    return float(_folded(prediction) in {_folded(answer) for answer in answers})


def anls(prediction: str, answers: Answers) -> float:
    """The normalised Levenshtein similarity of the best answer, 0 where half or more would have to be edited, in any case, runs of blanks counting as one.

    Biten et al., "Scene Text Visual Question Answering" (2019), equation 1: s = 1 - NL if NL < 0.5 else 0, NL the edit distance over the longer length.
    """
    return max((_similarity(_folded(prediction), _folded(answer)) for answer in answers), default=0.0)


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    distance = edit_distance(a, b) / longest if longest else 0.0
    return 1.0 - distance if distance < ANLS_LIMIT else 0.0


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def relaxed_accuracy(prediction: str, answers: Answers) -> float:
    """1 if the prediction is within 5 % of an answer that is a number, or equal to one that is none.

    Masry et al., "ChartQA" (2022), section 5.1, after Methani et al. (2020). A percent sign divides by 100. An answer of 0 has no 5 %: it is compared as text,
    as in the published code; so is a number with commas. Text is compared in any case.
    """
    return float(any(_relaxed(prediction.strip(), answer.strip()) for answer in answers))


def _relaxed(prediction: str, answer: str) -> bool:
    ours, theirs = _number(prediction), _number(answer)
    if ours is not None and theirs:
        return abs(ours - theirs) / abs(theirs) <= RELAXED
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?%?", text, re.IGNORECASE):
        return None
    value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    return value if math.isfinite(value) else None


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


ANSWER_METRICS: dict[str, Callable[[str, Answers], float]] = {
    "exact_match": exact_match, "anls": anls, "relaxed_accuracy": relaxed_accuracy,
    **{f"vqa_accuracy/{variant}": partial(vqa_accuracy, variant=variant) for variant in VQA_VARIANTS},
}


def pope_answer(text: str) -> str:
    """"yes" or "no" as POPE's code reads an answer: "no" if a word of its first sentence is No, not or no (without commas), else "yes", also if empty."""
    words = text.split(".")[0].replace(",", "").split()
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Scores of yes-or-no answers; "yes" is the positive class. Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (2023), section 5.

    Returns:
      {"accuracy", "precision", "recall", "f1", "yes_ratio": share of answers read as yes, "unparsed": share without the word yes or no, which the
      published reading (`pope_answer`) takes for one or the other}.
    Raises:
      DataError: for a label that is neither yes nor no, or lists of different lengths.
    """
    if len(predictions) != len(labels) or not labels:
        raise DataError(f"pope: {len(predictions)} answers to {len(labels)} questions; give one for each of at least one.")
    truth = [label.strip().lower() for label in labels]
    for number, label in enumerate(truth):
        if label not in ("yes", "no"):
            raise DataError(f"pope: the answer of question {number} is {labels[number]!r}; it must be yes or no.")
    answers = [pope_answer(text) for text in predictions]
    hits = sum(answer == label == "yes" for answer, label in zip(answers, truth))
    said, there = answers.count("yes"), truth.count("yes")
    precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
    unparsed = sum(not re.search(r"\b(yes|no|not)\b", text.lower()) for text in predictions)
    return {"accuracy": sum(answer == label for answer, label in zip(answers, truth)) / len(truth), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0, "yes_ratio": said / len(truth),
            "unparsed": unparsed / len(truth)}


def pope_splits(predictions: Sequence[str], labels: Sequence[str], splits: Sequence[str]) -> dict[str, float]:
    """The scores of `pope` for each split (random, popular, adversarial) as `f1/SPLIT`, and their means over the splits as `f1`."""
    names = list(dict.fromkeys(splits))
    parts: Mapping[str, dict[str, float]] = {
        name: pope([text for text, split in zip(predictions, splits) if split == name], [label for label, split in zip(labels, splits) if split == name])
        for name in names}
    metrics = list(parts[names[0]])
    return {**{metric: math.fsum(part[metric] for part in parts.values()) / len(parts) for metric in metrics},
            **{f"{metric}/{name}": part[metric] for name, part in parts.items() for metric in metrics}}
