"""Runs the evaluations of a config on a predictor, during training and from `python -m vlm_jax.evaluate`."""
from collections.abc import Mapping, Sequence
import os
import time
from typing import Any

from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.evaluation import evaluate


def due(settings: Mapping[str, Any], step: int, last: int) -> bool:
    """Returns whether an evaluation runs at `step`: every `every` steps and at the last one."""
    return step == last or (step > 0 and settings.get("every") is not None and step % settings["every"] == 0)


def owed(evaluations: Mapping[str, Mapping[str, Any]], step: int, last: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the evaluations that are due at `step` and of which `rows` of the metrics hold no result: those that an interruption left undone."""
    done = {row.get("name") for row in rows if row["kind"] == "eval" and row["step"] == step}
    return [name for name, settings in evaluations.items() if due(settings, step, last) and name not in done]


def evaluate_all(evaluations: Mapping[str, Mapping[str, Any]], predictor, workdir: str | os.PathLike, step: int,
                 only: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Returns {evaluation: metrics}, each with `seconds`; every evaluation writes `evaluations/NAME/STEP/` in the workdir.

    Raises:
      ConfigError: if `only` names an evaluation that the config does not have.
    """
    for name in only or ():
        if name not in evaluations:
            raise ConfigError(f"--only {name}: no such evaluation in the config.{did_you_mean(name, evaluations)}")
    results = {}
    for name in only or evaluations:
        settings = {key: value for key, value in evaluations[name].items() if key != "every"}
        started = time.perf_counter()
        metrics = evaluate(name, settings, predictor, os.path.join(workdir, "evaluations", name, str(step)))
        results[name] = dict(metrics, seconds=time.perf_counter() - started)
    return results


def print_metrics(name: str, step: int, metrics: Mapping[str, float]) -> None:
    """Prints one evaluation in a line; of metrics by language or class only the first dozen. Counts are whole, shares have three digits."""
    shown = [f"{key} {value:.3f}" if value % 1 else f"{key} {value:g}" for key, value in metrics.items() if key != "seconds"][:12]
    print(f"  {name} at step {step} ({metrics['seconds']:.1f} s): " + "  ".join(shown), flush=True)
