"""Image-text retrieval, both ways: recall at 1, 5 and 10 and the median rank.

A text is right for a picture if the picture, or another of its `group`, carries it; equal texts are one query. The rank of a query is that of its best right
answer, and ties count against the model:  rank = 1 + the number of wrong answers whose score is at least that of the best right one.
recall@k is the share of queries with rank <= k. A picture without a text in the language asked for is no query, but stays an answer to be confused with.
"""
from collections.abc import Iterator, Mapping, Sequence
import os
from typing import Any

from jaxtyping import Bool, Float, Int
import numpy as np

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import pictures, records

RECALLS = (1, 5, 10)
KEPT = 10          # answers of each query in predictions.jsonl
BLOCK = 2_000_000  # similarities at a time


def retrieval(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], languages: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluates retrieval on all records of a source.

    Args:
      languages: evaluate each of these languages (`texts_by_language` of the records) against the same pictures; the plain metrics are then their mean.
    Returns:
      {"text_to_image/r@1", ..., "text_to_image/median_rank", "image_to_text/...", "pictures"}; with languages also "text_to_image/r@1/LANGUAGE" ...
    Raises:
      DataError: if no record can be read or none has a text.
    """
    data, rows, _ = records.read(source, predictor)
    groups = np.unique([str(row.get("group", f"record {row['index']}")) for row in rows], return_inverse=True)[1]
    images = predictor.embed_images([row["image"] for row in rows])
    metrics, predictions, shown = {"pictures": len(rows)}, [], None
    for language in languages or [None]:
        texts, owners = captions(rows, groups, language, data.name)
        embedded = predictor.embed_texts(texts)
        suffix = "" if language is None else f"/{language}"
        asked = np.flatnonzero(owners.any(axis=0)[groups])
        for direction, queries, answers, right in (
                ("text_to_image", embedded, images, lambda start, stop, owners=owners: owners[start:stop][:, groups]),
                ("image_to_text", images[asked], embedded, lambda start, stop, owners=owners, asked=asked: owners[:, groups[asked[start:stop]]].T)):
            ranks, best = rank(queries, answers, right)
            metrics.update(recalls(ranks, direction, suffix))
            numbers = asked if direction == "image_to_text" else range(len(texts))
            found = [_prediction(direction, language, number, place, answered, rows, texts) for number, place, answered in zip(numbers, ranks, best)]
            predictions += found
            if shown is None or (len(shown) < 2 and language == (languages or [None])[0]):
                shown = {**(shown or {}), direction: (ranks, found)}
    if languages:
        metrics.update(_means(metrics, languages))
    metrics = records.write(folder, metrics, predictions)
    with records.writing(folder) as writes:
        if writes:
            thumbnails = {row["index"]: records.thumbnail(row["image"]) for row in rows}
            pictures.text_to_image(os.path.join(folder, "text_to_image.png"), shown["text_to_image"][1], thumbnails)
            pictures.image_to_text(os.path.join(folder, "image_to_text.png"), shown["image_to_text"][1], thumbnails)
            pictures.recall_curve(os.path.join(folder, "recall_curve.png"), {direction: ranks for direction, (ranks, _) in shown.items()}, len(rows))
    return metrics


def captions(rows: Sequence[Mapping[str, Any]], groups: Int[np.ndarray, "N"], language: str | None, name: str) -> tuple[list[str], Bool[np.ndarray, "T G"]]:
    """Returns the distinct texts and, for each, the groups of pictures that carry it.

    Raises:
      ConfigError: if the records have no texts by language.
      DataError: if they have none in this one.
    """
    places: dict[str, set[int]] = {}
    for row, group in zip(rows, groups):
        if language is not None and "texts_by_language" not in row:
            raise ConfigError(f"languages: the records of {name} have no texts_by_language; remove the setting.")
        texts = row.get("texts", ()) if language is None else row["texts_by_language"].get(language, ())
        texts = [texts] if isinstance(texts, str) else texts     # a string is one caption, not its letters
        for text in texts:
            places.setdefault(text, set()).add(int(group))
    if not places:
        raise DataError(f"{name}: no record has a text{'' if language is None else ' in ' + language}; retrieval needs captions.")
    owners = np.zeros((len(places), int(groups.max()) + 1), bool)
    for number, held in enumerate(places.values()):
        owners[number, list(held)] = True
    return list(places), owners


def rank(queries: Float[np.ndarray, "Q D"], answers: Float[np.ndarray, "A D"], right) -> tuple[Int[np.ndarray, "Q"], list[list[tuple[int, float, bool]]]]:
    """Returns the rank of every query and its best answers as (number, score, right), best first, wrong before right where scores tie.

    Args:
      right: (start, stop) -> bool [stop - start, A]: which answers are right for those queries; at least one each.
    """
    ranks, best = np.zeros(len(queries), np.int64), []
    for start, stop in _blocks(len(queries), len(answers)):
        scores = queries[start:stop].astype(np.float64) @ answers.astype(np.float64).T
        correct = right(start, stop)
        target = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[start:stop] = 1 + ((scores >= target) & ~correct).sum(axis=1)
        for row, hits in zip(scores, correct):
            order = np.lexsort((hits, -row))[:KEPT]
            best.append([(int(i), float(row[i]), bool(hits[i])) for i in order])
    return ranks, best


def recalls(ranks: Int[np.ndarray, "Q"], direction: str, suffix: str = "") -> dict[str, float]:
    """Returns recall@1, 5, 10 and the median rank, named `DIRECTION/r@1SUFFIX` ..."""
    found = {f"{direction}/r@{k}{suffix}": float(np.mean(ranks <= k)) for k in RECALLS}
    return {**found, f"{direction}/median_rank{suffix}": float(np.median(ranks))}


def score_predictions(path: str | os.PathLike) -> dict[str, float]:
    """Computes the recalls again from a predictions.jsonl: from its lists of answers, not from the ranks stored beside them."""
    queries: dict[tuple[str, str], list[int]] = {}
    for line in records.read_predictions(path):
        hits = [place for place, answer in enumerate(line["answers"], 1) if answer["right"]]
        suffix = "" if line["language"] is None else f"/{line['language']}"
        queries.setdefault((line["direction"], suffix), []).append(hits[0] if hits else KEPT + 1)
    metrics = {name: value for (direction, suffix), ranks in queries.items()
               for name, value in recalls(np.array(ranks), direction, suffix).items() if "/r@" in name}
    return {**metrics, **_means(metrics, list(dict.fromkeys(suffix[1:] for _, suffix in queries if suffix)))}


def _means(metrics: Mapping[str, float], languages: Sequence[str]) -> dict[str, float]:
    """The plain metrics of an evaluation by language: the means over them."""
    bases = [name.removesuffix(f"/{languages[0]}") for name in metrics if name.endswith(f"/{languages[0]}")] if languages else []
    return {base: float(np.mean([metrics[f"{base}/{language}"] for language in languages])) for base in bases}


def _blocks(queries: int, answers: int) -> Iterator[tuple[int, int]]:
    size = max(1, BLOCK // max(1, answers))
    return ((start, min(start + size, queries)) for start in range(0, queries, size))


def _prediction(direction: str, language: str | None, number: int, place: int, best: list, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict:
    def picture(i: int) -> dict:
        return {"index": rows[i]["index"], "caption": (rows[i].get("texts") or [""])[0]}
    to_image = direction == "text_to_image"
    query = {"text": texts[number]} if to_image else picture(number)
    answers = [{**(picture(i) if to_image else {"text": texts[i]}), "score": round(score, 6), "right": hit} for i, score, hit in best]
    return {"direction": direction, "language": language, "query": query, "rank": int(place), "answers": answers}
