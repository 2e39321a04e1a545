"""Evaluations: numbers that can be computed again from what is written, and pictures that show them.

`evaluate` runs one by its name in the config; each writes `metrics.json`, `predictions.jsonl` (one line a query, enough to score again) and PNG pictures.
"""
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
import os
from typing import Any

from vlm_jax.data.sources import build_source
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation.class_names import read_class_names, read_templates
from vlm_jax.settings import call, choose

EVALUATORS: dict[str, str] = {
    "retrieval": "vlm_jax.evaluation.retrieval:retrieval",
    "zero_shot": "vlm_jax.evaluation.zero_shot:zero_shot",
    "linear_probe": "vlm_jax.evaluation.linear_probe:linear_probe",
    "captioning": "vlm_jax.evaluation.answering:captioning",
    "vqa": "vlm_jax.evaluation.answering:vqa",
    "grounding": "vlm_jax.evaluation.answering:grounding",
    "few_shot": "vlm_jax.evaluation.few_shot:few_shot",
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
    where, evaluator = f"evaluations.{name}", _evaluator(name, settings)
    settings = {key: value for key, value in settings.items() if key != "evaluator"}
    try:
        return call(evaluator, settings, where, predictor=predictor, folder=folder)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def check(evaluations: Mapping[str, Mapping[str, Any]]) -> None:
    """Finds, before the first step and not at the first evaluation, settings that no evaluator takes, sources that are not there, and unreadable class names.

    Args:
      evaluations: the section of a config.
    Raises:
      ConfigError, DataError: as `evaluate`.
    """
    for name, settings in evaluations.items():
        where, evaluator = f"evaluations.{name}", _evaluator(name, settings)
        settings = {key: value for key, value in settings.items() if key not in ("evaluator", "every")}
        call(wraps(evaluator)(lambda **_: None), settings, where, predictor=None, folder=None)
        try:
            source = build_source(settings["source"], f"{where}.source")
            if settings.get("support") is not None:
                build_source(settings["support"], f"{where}.support")
            if evaluator.__name__ == "few_shot":
                import_module(evaluator.__module__).check_settings(**settings)
            if evaluator.__name__ == "zero_shot":
                read_templates(settings.get("templates", ("{}",)))
                read_class_names(settings.get("class_names"), getattr(source, "class_names", None), source.name)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _evaluator(name: str, settings: Mapping[str, Any]) -> Callable[..., dict[str, float]]:
    where = f"evaluations.{name}.evaluator"
    if "evaluator" not in settings:
        raise ConfigError(f"{where} is missing; choose one of {', '.join(EVALUATORS)}.")
    module, function = choose(EVALUATORS, settings["evaluator"], where).split(":")
    return getattr(import_module(module), function)
