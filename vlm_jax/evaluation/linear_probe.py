"""Linear probe: logistic regression on the frozen image tower's pooled features. Radford et al. 2021, section 3.2 and appendix A.3.

Features are standardised by the training set; the strength of the L2 penalty is the one that is best on the validation set; then the classifier is fitted
again on both. Differs from the paper: 13 strengths, a factor 10 apart, instead of a search over 96.
"""
from collections.abc import Mapping, Sequence
import os
from typing import Any
import warnings

import numpy as np

from vlm_jax.errors import DataError
from vlm_jax.evaluation import records

STRENGTHS = tuple(10.0 ** power for power in range(-6, 7))


def linear_probe(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], train: Mapping[str, Any], validation: Mapping[str, Any],
                 strengths: Sequence[float] = STRENGTHS, iterations: int = 1000) -> dict[str, float]:
    """Fits on the sources `train` and `validation`, scores on `source`; records need a `label`.

    Returns:
      {"top1", "validation_top1", "strength": the penalty that was chosen, "pictures"}.
    Raises:
      DataError: for a record without a label, or a training set of one class.
    """
    (x, y, _), (x_valid, y_valid, _), (x_test, y_test, indices) = (_features(predictor, split) for split in (train, validation, source))
    if len(np.unique(y)) < 2:
        raise DataError("linear_probe.train has one class only; a probe needs two.")
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    x, x_valid, x_test = ((part - mean) / deviation for part in (x, x_valid, x_test))
    scores = []
    for strength in strengths:
        records.progress(predictor)
        scores.append(float(np.mean(_fit(x, y, strength, iterations).predict(x_valid) == y_valid)))
    strength = strengths[int(np.argmax(scores))]
    model = _fit(np.concatenate([x, x_valid]), np.concatenate([y, y_valid]), strength, iterations)
    answers = model.predict(x_test)
    predictions = [{"index": int(index), "label": int(label), "answer": int(answer)} for index, label, answer in zip(indices, y_test, answers)]
    metrics = {"top1": float(np.mean(answers == y_test)), "validation_top1": max(scores), "strength": strength, "pictures": len(y_test)}
    return records.write(folder, metrics, predictions)


def score_predictions(path: str | os.PathLike) -> dict[str, float]:
    """Computes top1 again from a predictions.jsonl."""
    lines = records.read_predictions(path)
    return {"top1": float(np.mean([line["label"] == line["answer"] for line in lines]))}


def _features(predictor: Any, settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data, rows, _ = records.read(settings, predictor)
    for row in rows:
        if not isinstance(row.get("label"), (int, np.integer)):
            raise DataError(f"{data.describe(row['index'])}: it has no integer label; a linear probe needs one.")
    features = predictor.features([row["image"] for row in rows]).astype(np.float64)
    return features, np.array([row["label"] for row in rows]), np.array([row["index"] for row in rows])


def _fit(x: np.ndarray, y: np.ndarray, strength: float, iterations: int):
    """L-BFGS on the mean log-loss plus strength / 2 times the squared norm of the weights."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)   # at weak penalties the paper's 1000 iterations may not be enough, as there
        return LogisticRegression(C=1.0 / (strength * len(y)), max_iter=iterations).fit(x, y)
