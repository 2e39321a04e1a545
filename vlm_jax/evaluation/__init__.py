"""Evaluations: numbers that can be computed again from what is written, and pictures that show them.

`evaluate` runs one by its name in the config; each writes `metrics.json`, `predictions.jsonl` (one line a query, enough to score again) and PNG pictures.
"""
from collections.abc import Mapping
from importlib import import_module
import os
from typing import Any

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.settings import call, choose

EVALUATORS: dict[str, str] = {
    "retrieval": "vlm_jax.evaluation.retrieval:retrieval",
    "zero_shot": "vlm_jax.evaluation.zero_shot:zero_shot",
    "linear_probe": "vlm_jax.evaluation.linear_probe:linear_probe",
    "captioning": "vlm_jax.evaluation.answering:captioning",
    "vqa": "vlm_jax.evaluation.answering:vqa",
    "grounding": "vlm_jax.evaluation.answering:grounding",
}


def evaluate(name: str, settings: Mapping[str, Any], predictor: Any, folder: str | os.PathLike) -> dict[str, float]:
    """Runs the evaluation `name` of a config.

    Args:
      settings: {"evaluator": a name of `EVALUATORS`, "source": {...}, and the settings of that evaluator}.
      predictor: a `vlm_jax.evaluation.predictor.Predictor`, or for generated text a `vlm_jax.evaluation.generator.Generator`.
      folder: where metrics.json, predictions.jsonl and pictures go; made if it does not exist.
    Returns:
      {metric: value}.
    Raises:
      ConfigError: for an unknown evaluator, source or setting.
      DataError: for data that cannot be evaluated.
    """
    settings = dict(settings)
    where = f"evaluations.{name}"
    if "evaluator" not in settings:
        raise ConfigError(f"{where}.evaluator is missing; choose one of {', '.join(EVALUATORS)}.")
    module, function = choose(EVALUATORS, settings.pop("evaluator"), f"{where}.evaluator").split(":")
    try:
        return call(getattr(import_module(module), function), settings, where, predictor=predictor, folder=folder)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
