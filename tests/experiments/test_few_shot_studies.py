"""The few-shot studies: errors over seeds, the figure, and a run from end to end at the test variant."""
import json

import numpy as np
import pytest

from experiments.flamingo_fewshot import run as flamingo


def runs(*accuracies):
    """One run a seed, of every evaluation at 0 and 8 shots."""
    return [{name: {f"{kind}/{number}_shots": value for number, accuracy in ((0, 0.5), (8, values[name])) for kind, value in (("accuracy", accuracy),
             ("standard_error", 0.03))} for name in values} for values in accuracies]


def test_errors_are_over_seeds_and_over_questions():
    made = runs(dict(rices=0.8, random=0.5), dict(rices=0.6, random=0.4))
    assert flamingo.curve(made, "rices", (0, 4, 8)) == {0: {"mean": 0.5, "standard_error": 0.0}, 8: pytest.approx({"mean": 0.7, "standard_error": 0.1})}
    mean, error = flamingo.difference(made, "rices", "random", 8)
    assert mean == pytest.approx(0.25) and error == pytest.approx(0.05)
    same = runs(dict(rices=0.8, random=0.5), dict(rices=0.8, random=0.5))
    assert flamingo.difference(same, "rices", "random", 8)[1] == pytest.approx(np.hypot(0.03, 0.03) / np.sqrt(2))
    assert flamingo.curve(made[:1], "random", (8,))[8] == {"mean": 0.5, "standard_error": 0.03}


def test_the_figure_draws_every_curve(tmp_path):
    pytest.importorskip("matplotlib")
    curves = {name: {number: {"mean": 0.5, "standard_error": 0.1} for number in numbers}
              for name, numbers in (("real", (0, 8)), ("shuffled", (0, 8)), ("blind", (8,)), ("random", (8,)), ("rices", (8,)))}
    flamingo.figure(tmp_path / "figure.png", curves, 0.5, 3)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_study_of_flamingo_records_its_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0")
    metrics = flamingo.main(tmp_path / "runs", (4,), tmp_path / "out", "test")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"accuracy_0_shots", "accuracy_8_shots", "gain_8_minus_0", "real_minus_shuffled", "rices_minus_random", "rices_standard_error"} <= set(metrics)
    assert written["seeds"] == [4] and (tmp_path / "out" / "figure.png").exists()


@pytest.mark.slow
def test_the_study_of_frozen_records_its_figures(tmp_path, monkeypatch):
    from experiments.frozen_binding import run as frozen
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0")
    metrics = frozen.main(tmp_path / "runs", (4,), tmp_path / "out", "test")
    assert metrics["chance"] == 0.5 and metrics["standard_error"] >= 0.25 and 0 <= metrics["one_shot_accuracy"] <= 1
    assert "shuffled_one_shot_accuracy" in json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
