"""Evaluations of generated text: captions (`captioning`), short answers (`vqa`) and boxes (`grounding`).

Each asks the model about every record of a source and writes down what it said; the metrics are computed from these lines and from nothing else, so that
`score_predictions` gives them again without a model.
"""
from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

from vlm_jax.errors import ConfigError, DataError, did_you_mean
from vlm_jax.evaluation import metrics as text_metrics, pictures, records
from vlm_jax.evaluation.generator import generator_of
from vlm_jax.evaluation.metrics.tokens import tokenizer_of
from vlm_jax.settings import choose

CAPTION_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
Lines = Sequence[Mapping[str, Any]]


def captioning(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], prompt: str | None = None, max_tokens: int = 48,
               tokenizer: str | None = None, metrics: Sequence[str] = CAPTION_METRICS, images: bool = True, batch_size: int | None = None) -> dict[str, float]:
    """Evaluates captions against the `texts` of the records, all of which are right.

    Args:
      prompt: what is asked about every picture; by default the `prompt` of the record, "" if it has none.
      max_tokens: the longest caption.
      tokenizer: a name of `metrics.TOKENIZERS`; by default "characters" for languages that are written without blanks, else "ptb_like".
      metrics: of `metrics.caption_scores`.
      images: False keeps the pictures from the model: what it would say anyway.
      batch_size: prompts at a time.
    Returns:
      {"cider_d/tokenizer=ptb_like", ..., "exact_match", "pictures"}. Records with a `language` are scored by language, `cider_d/de/tokenizer=ptb_like`, where
      the corpus of CIDEr-D is that language's, and `cider_d/mean_of_languages` is the mean of these.
    Raises:
      DataError: for a record without texts, or that cannot be asked.
    """
    if tokenizer is not None:
        choose(text_metrics.TOKENIZERS, tokenizer, "tokenizer")
    return _evaluate(predictor, folder, source, prompt, max_tokens, images, batch_size, _score_captions,
                     lambda line: text_metrics.exact_match(*_pair(line)) == 1,
                     lambda row: {"language": row.get("language"), "tokenizer": tokenizer or tokenizer_of(row.get("language")), "metrics": list(metrics)})


def vqa(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], metrics: Sequence[str] = ("exact_match",), prompt: str | None = None,
        max_tokens: int = 16, images: bool = True, batch_size: int | None = None) -> dict[str, float]:
    """Evaluates short answers against the `texts` of the records.

    Args:
      metrics: names of `metrics.ANSWER_METRICS` (exact_match, anls, relaxed_accuracy, vqa_accuracy/official, ...), or "pope" for yes-or-no questions, whose
        records may say their `split`.
      prompt, max_tokens, images, batch_size: see `captioning`.
    Returns:
      {metric: its mean, "METRIC/TASK": its mean over the records of that `task`, where there are several, "pictures"}.
    Raises:
      ConfigError: for an unknown metric. DataError: for a record without texts, or that cannot be asked.
    """
    known = [*text_metrics.ANSWER_METRICS, "pope"]
    for name in metrics:
        if name not in known:
            raise ConfigError(f'metrics: "{name}" is unknown.{did_you_mean(name, known)}')
    judged = next((name for name in metrics if name != "pope"), "exact_match")
    return _evaluate(predictor, folder, source, prompt, max_tokens, images, batch_size, _score_answers,
                     lambda line: text_metrics.ANSWER_METRICS[judged](*_pair(line)) >= 0.5,
                     lambda row: {"task": row.get("task"), "split": row.get("split"), "metrics": list(metrics)})


def grounding(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], threshold: float = 0.5, prompt: str | None = None, max_tokens: int = 24,
              images: bool = True, batch_size: int | None = None) -> dict[str, float]:
    """Evaluates boxes: the first one of each answer, written as location tokens, against that of the record's first text.

    Args:
      threshold: the overlap (intersection over union) from which an answer is right.
      prompt, max_tokens, images, batch_size: see `captioning`.
    Returns:
      {"iou@0.5", "mean_iou", "unparsed": see `metrics.referring`, "METRIC/TASK": by the records' `task`, where there are several, "pictures"}.
    Raises:
      DataError: for a record whose first text has no box, or that cannot be asked.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise ConfigError(f"threshold is {threshold!r}; it must be above 0 and at most 1.")

    def right(line: Mapping[str, Any]) -> bool:
        return text_metrics.referring([line["prediction"]], line["references"][:1], threshold)[1][0] >= threshold
    return _evaluate(predictor, folder, source, prompt, max_tokens, images, batch_size, _score_boxes, right,
                     lambda row: {"task": row.get("task"), "threshold": threshold}, boxes=True)


def score_predictions(path: str | os.PathLike) -> dict[str, float]:
    """Computes the metrics again from a predictions.jsonl, which says by itself of which evaluation it is."""
    lines = records.read_predictions(path)
    if not lines:
        raise DataError(f"{path}: there are no predictions in it; evaluate again.")
    score = _score_boxes if "threshold" in lines[0] else _score_captions if "tokenizer" in lines[0] else _score_answers
    return score(lines)


def _evaluate(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], prompt: str | None, max_tokens: int, images: bool, batch_size: int | None,
              score: Callable[[Lines], dict[str, float]], right: Callable[[Mapping[str, Any]], bool], facts: Callable[[Mapping[str, Any]], dict[str, Any]],
              boxes: bool = False) -> dict[str, float]:
    generator = generator_of(predictor, batch_size)
    data, rows, _ = records.read(source, predictor)
    names = [data.describe(row["index"]) for row in rows]
    for row, name in zip(rows, names):
        texts = row.get("texts")
        if isinstance(texts, str) or not texts:
            raise DataError(f"{name}: it has no list of texts to compare an answer with; give the record texts, or leave it out.")
    prompts = [row.get("prompt", "") if prompt is None else prompt for row in rows]
    answers = generator.answer([row.get("image") for row in rows] if images else None, prompts, max_tokens, names)
    lines = [{"index": row["index"], "prompt": asked, "prediction": answer, "references": list(row["texts"]), **facts(row)}
             for row, asked, answer in zip(rows, prompts, answers)]
    metrics = records.write(folder, score(lines), lines)
    with records.writing(folder) as writes:
        if writes:
            shown = [{**line, "right": right(line)} for line in lines[:pictures.QUERIES]]
            if boxes:
                shown = [{**line, "boxes": {"target": text_metrics.parse_boxes(line["references"][0])[:1],
                                            "answer": text_metrics.parse_boxes(line["prediction"])[:1]}} for line in shown]
            thumbnails = {row["index"]: records.thumbnail(row.get("image")) for row in rows[:pictures.QUERIES]}
            pictures.answered(os.path.join(folder, "answers.png"), shown, thumbnails)
    return metrics


def _pair(line: Mapping[str, Any]) -> tuple[str, list[str]]:
    return line["prediction"], line["references"]


def _score_captions(lines: Lines) -> dict[str, float]:
    scores: dict[str, float] = {}
    languages = list(dict.fromkeys(line["language"] for line in lines))
    for language in languages:
        part = [line for line in lines if line["language"] == language]
        found = text_metrics.caption_scores(*zip(*map(_pair, part)), tokenizer=part[0]["tokenizer"], metrics=part[0]["metrics"])
        for key, value in found.items():
            metric, tokenizer = key.split("/")
            scores["/".join([metric, *([language] if language else []), tokenizer])] = value
        if language:
            scores[f"exact_match/{language}"] = _mean([text_metrics.exact_match(*_pair(line)) for line in part])
    if any(languages):
        for metric in lines[0]["metrics"]:
            scores[f"{metric}/mean_of_languages"] = _mean([value for key, value in scores.items() if key.startswith(f"{metric}/")])
    return {**scores, "exact_match": _mean([text_metrics.exact_match(*_pair(line)) for line in lines]), "pictures": len(lines)}


def _score_answers(lines: Lines) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in lines[0]["metrics"]:
        if metric == "pope":
            arguments = [line["prediction"] for line in lines], [line["references"][0] for line in lines]
            split = [line.get("split") for line in lines]
            found = text_metrics.pope_splits(*arguments, split) if all(split) else text_metrics.pope(*arguments)
            scores.update({f"pope/{key}": value for key, value in found.items()})
            continue
        scores.update(_by_task(metric, lines, [text_metrics.ANSWER_METRICS[metric](*_pair(line)) for line in lines]))
    return {**scores, "pictures": len(lines)}


def _score_boxes(lines: Lines) -> dict[str, float]:
    scores: dict[str, float] = {}
    tasks = [None, *_tasks(lines)]
    for task in tasks:
        part = [line for line in lines if task is None or line["task"] == task]
        found, _ = text_metrics.referring([line["prediction"] for line in part], [line["references"][0] for line in part], lines[0]["threshold"])
        scores.update({key if task is None else f"{key}/{task}": value for key, value in found.items()})
    return {**scores, "pictures": len(lines)}


def _by_task(metric: str, lines: Lines, values: Sequence[float]) -> dict[str, float]:
    parts = {f"{metric}/{task}": _mean([value for line, value in zip(lines, values) if line["task"] == task]) for task in _tasks(lines)}
    return {metric: _mean(values), **parts}


def _tasks(lines: Lines) -> list[str]:
    """The tasks of the records, if there are several."""
    tasks = [task for task in dict.fromkeys(line.get("task") for line in lines) if task]
    return tasks if len(tasks) > 1 else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
