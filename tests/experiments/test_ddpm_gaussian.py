"""The Gaussian study writes the figures that it promises, at a small size."""
import json

import pytest

from experiments.ddpm_gaussian import run


@pytest.mark.slow
def test_the_study_records_its_figures(tmp_path):
    metrics = run.main(["--steps", "200", "--rows", "128", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["name"] == "ddpm_gaussian" and metrics["bits_per_dim_flow_relative_error"] < 0.03
    assert metrics["mean_error_standard_errors"] < 4 and metrics["posterior_mean_error"] < 1e-3
    assert set(written["metrics"]) == set(metrics)
