"""Zero-shot classification: the class whose name, written into prompts, lies closest to the picture.

Radford et al. 2021, section 3.1: a class is the normalised mean of the normalised embeddings of its prompts, one for each template.
"""
from collections import Counter
from collections.abc import Mapping, Sequence
import os
from typing import Any

from jaxtyping import Float
import numpy as np

from vlm_jax.errors import DataError
from vlm_jax.evaluation import pictures, records
from vlm_jax.evaluation.class_names import read_class_names, read_templates

KEPT = 5


def zero_shot(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], templates: str | Sequence[str] = ("{}",),
              class_names: str | Sequence[str] | None = None) -> dict[str, float]:
    """Classifies all records of a source by their `label`, always among all classes.

    Args:
      templates: prompts with `{}` for the class name: a list, "ensemble" (80 of ours) or a file of them (`class_names.read_templates`).
      class_names: the names of the labels 0, 1, ...; by default those of the source. A list or a file; needed where the source's are WordNet ids
        (`class_names.read_class_names`).
    Returns:
      {"top1", "top5", "mean_per_class": top1 averaged over the classes that occur, "pictures", "classes"}. Ties count against the model.
    Raises:
      ConfigError: for a template without `{}`, or no class names that can be read.
      DataError: for a record without a label among the classes.
    """
    templates = read_templates(templates)
    data, rows, _ = records.read(source, predictor)
    names = read_class_names(class_names, getattr(data, "class_names", None), data.name)
    if same := [name for name, count in Counter(names).items() if count > 1]:
        print(f"  {data.name}: {len(same)} names belong to several classes ({', '.join(same[:3])}); these tie, which counts against the model", flush=True)
    for row in rows:
        if not isinstance(row.get("label"), (int, np.integer)) or not 0 <= row["label"] < len(names):
            raise DataError(f"{data.describe(row['index'])}: its label {row.get('label')!r} is not one of the {len(names)} classes; "
                            "correct label or class_names.")
    classes = class_embeddings(predictor, names, templates)
    scores = predictor.embed_images([row["image"] for row in rows]) @ classes.T
    labels = np.array([row["label"] for row in rows])
    own = scores[np.arange(len(rows)), labels][:, None]
    ranks = (scores >= own).sum(axis=1)
    order = np.lexsort((np.arange(len(names))[None] == labels[:, None], -scores), axis=1)[:, :KEPT]
    predictions = [{"index": row["index"], "label": int(row["label"]), "class": names[row["label"]], "rank": int(place),
                    "answers": [{"label": int(i), "class": names[i], "score": round(float(score[i]), 6)} for i in best]}
                   for row, place, best, score in zip(rows, ranks, order, scores)]
    metrics = records.write(folder, {**accuracy(labels, ranks), "pictures": len(rows), "classes": len(names)}, predictions)
    with records.writing(folder) as writes:
        if writes:
            thumbnails = {row["index"]: records.thumbnail(row["image"]) for row in rows[:pictures.QUERIES]}
            pictures.classified(os.path.join(folder, "classified.png"), predictions, thumbnails)
            pictures.confusion(os.path.join(folder, "confusion.png"), labels, order[:, 0], names)
    return metrics


def class_embeddings(predictor: Any, names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "C D"]:
    """Returns one embedding a class, of length 1."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embedded = predictor.embed_texts(prompts).reshape(len(names), len(templates), -1)
    mean = embedded.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def accuracy(labels: np.ndarray, ranks: np.ndarray) -> dict[str, float]:
    """Returns top1, top5 and mean_per_class from the rank of each record's own class."""
    per_class = [float(np.mean(ranks[labels == label] == 1)) for label in np.unique(labels)]
    return {"top1": float(np.mean(ranks == 1)), "top5": float(np.mean(ranks <= 5)), "mean_per_class": float(np.mean(per_class))}


def score_predictions(path: str | os.PathLike) -> dict[str, float]:
    """Computes the accuracies again from a predictions.jsonl: from its answers, not from the ranks stored beside them."""
    lines = records.read_predictions(path)
    labels = np.array([line["label"] for line in lines])
    places = [[answer["label"] for answer in line["answers"]] for line in lines]
    ranks = np.array([best.index(label) + 1 if label in best else KEPT + 1 for best, label in zip(places, labels)])
    return accuracy(labels, ranks)
