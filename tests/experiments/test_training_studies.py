"""The training studies run from end to end at their test variants and write the figures that they promise."""
import json

import pytest

from experiments.siglip_emoji import run as emoji
from experiments.siglip_shapes import run as shapes
from vlm_jax.data.worlds.emoji_font import emoji_ready
from vlm_jax.data.worlds.emoji_splits import HELDOUT_LANGUAGES, TRAIN_LANGUAGES


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0")


@pytest.mark.slow
def test_shapes_study_records_its_figures(tmp_path):
    metrics = shapes.main(tmp_path / "runs", (4,), tmp_path / "out", "test")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= metrics["heldout_pairs_top1"] <= 1
    assert written["seeds"] == [4] and written["metrics"]["heldout_pairs_top1"] == pytest.approx(metrics["heldout_pairs_top1"], rel=1e-3)


@pytest.mark.slow
def test_emoji_study_records_its_figures_and_every_language(tmp_path):
    if missing := emoji_ready():
        pytest.skip(f"the emoji data cannot be drawn here: {missing}")
    metrics = emoji.main(tmp_path / "runs", (0,), True, tmp_path / "out", "test")
    assert {"heldout_attributes_t2i_r1", "heldout_attributes_t2i_r5"} <= set(metrics)
    assert {f"multilingual_r1_{language}" for language in (*TRAIN_LANGUAGES, *HELDOUT_LANGUAGES)} <= set(metrics)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(written["details"]["font_sha256"]) == 64
