"""The studies of PaLI on shapes and on emoji run from end to end at their test variants and write the figures that they promise."""
import json

import pytest

from experiments.pali_emoji import run as emoji
from experiments.pali_shapes import run as shapes
from vlm_jax.data.worlds.emoji_font import emoji_ready


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0")


@pytest.mark.slow
def test_shapes_study_records_its_figures(tmp_path):
    metrics = shapes.main(tmp_path / "runs", (4,), tmp_path / "out", "test")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"vqa_heldout", "caption_exact_heldout", "refer_iou50_heldout", "text_only_baseline"} <= set(written["metrics"])
    assert all(0 <= value <= 1 for value in metrics.values()) and written["seeds"] == [4]


@pytest.mark.slow
def test_emoji_study_records_every_language(tmp_path):
    if missing := emoji_ready():
        pytest.skip(f"the emoji data cannot be drawn here: {missing}")
    metrics = emoji.main(tmp_path / "runs", tmp_path / "out", "test")
    assert {"cider_d_en", "cider_d_mean", "exact_match"} <= set(metrics)
