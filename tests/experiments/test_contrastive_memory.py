"""The study's own arithmetic, its recorded figures against the bars, and one small measurement."""
import json
import re

from experiments.contrastive_memory import run


def test_the_ring_needs_far_less_than_dense():
    """8 devices x 64 pairs: compiled here, not recorded."""
    chunked, dense = (run.temporary_bytes("sigmoid", 8, 64, 16, chunked) for chunked in (True, False))
    assert 0 < chunked < 0.5 * dense


def test_the_figures_are_the_worse_of_the_two_losses():
    rows = [dict(loss=loss, devices=devices, pairs=pairs, width=width, chunked=chunked, bytes=size + (loss == "softmax"))
            for loss in run.LOSSES for width in run.WIDTHS
            for devices, pairs, chunked, size in [(8, 512, True, 20), (8, 512, False, 100), (8, 128, True, 10), (64, 128, True, 11)]]
    assert run.metrics_of(rows) == {"chunked_over_dense_temp_bytes_width64": 21 / 101, "chunked_over_dense_temp_bytes_width768": 21 / 101,
                                    "growth_8_to_64_devices": 1.1}


def test_the_recorded_figures_are_within_the_bars_and_in_the_readme():
    results = json.loads((run.FOLDER / "results.json").read_text())
    metrics = results["metrics"]
    assert metrics["chunked_over_dense_temp_bytes_width64"] <= 0.2
    assert metrics["chunked_over_dense_temp_bytes_width768"] <= 1 / 3
    assert abs(metrics["growth_8_to_64_devices"] - 1) <= 0.05
    numbers = set(re.findall(r"\d[\d,]{5,}", (run.FOLDER / "README.md").read_text()))
    assert {f"{row['bytes']:,}" for row in results["details"]["temporary_bytes_per_device"]} <= numbers
