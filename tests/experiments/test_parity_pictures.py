"""The study of models that see pictures against transformers; the sweep is experiments/parity."""
import numpy as np
import pytest

from experiments.parity.compare import FAMILIES, compare, sample
from experiments.parity.picture_configurations import FAMILIES as PICTURES
from experiments.parity.pictures import batch
from experiments.parity.run import summary
from experiments.parity.texts import batch as text_batch


def test_configurations_cover_what_the_study_says():
    draws = {family: [sample(family, seed) for seed in range(40)] for family in PICTURES}
    assert draws["clip"][7] == sample("clip", 7) and set(PICTURES) < set(FAMILIES)
    assert {configuration.rows for configuration in draws["vit"]} == {1, 5}
    for family in ("siglip", "clip", "vit", "vit_labels"):
        assert any(height != width for ((height, width),) in (configuration.sizes for configuration in draws[family]))
    assert all(columns > 1 for configuration in draws["siglip2"] for _, columns in configuration.sizes)
    windows = {configuration.settings["text_config"]["sliding_window"] for configuration in draws["paligemma2"]}
    assert windows == {2, 3, 6}
    assert "images" not in text_batch(sample("gpt2", 0)) and batch(draws["siglip"][0])["images"].ndim == 4


@pytest.mark.parametrize("seed, padding, prefixed", [(0, "left", True), (1, "right", True), (2, "none", False)])
def test_texts_with_pictures_have_their_places_padding_and_prefix(seed, padding, prefixed):
    configuration = sample("paligemma2", seed)
    inputs = batch(configuration)
    valid, slots = inputs["valid"], inputs["slots"]
    assert configuration.padding == padding and inputs["prefix"].any() == prefixed
    assert valid[:, 0].all() == (padding != "left") and valid[:, -1].all() == (padding != "right")
    vision = configuration.settings["vision_config"]
    places = np.arange((vision["image_size"] // vision["patch_size"]) ** 2)
    for row, kept, tokens in zip(slots, valid, inputs["tokens"]):
        np.testing.assert_array_equal(row[kept][:places.size], places)
        assert ((row >= 0) == (tokens == configuration.settings["image_token_index"])).all() and (row >= 0).sum() == places.size


@pytest.mark.parametrize("family, seed, dtypes", [("siglip2", 5, ("float32",)), ("paligemma2", 4, ("float32", "bfloat16"))])
def test_numbers_round_trip_and_export(family, seed, dtypes, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    found = compare(sample(family, seed), tmp_path, dtypes)
    assert found["float32"] <= 1e-4 and found["export"] <= 1e-5 and found["round_trip"]
    if "bfloat16" in dtypes:
        assert found["bfloat16"] <= 1.5 * found["reference_bfloat16"]
        assert summary({family: [found]})[f"{family}_round_trips_exact"] == 1
