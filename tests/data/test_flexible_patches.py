import numpy as np
from PIL import Image
import pytest

from vlm_jax.data.images import FlexiblePatches
from vlm_jax.data.operations import build
from vlm_jax.errors import ConfigError


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("height, width, budget, size", [(37, 91, 20, 4), (200, 13, 33, 7), (16, 16, 1, 16), (1, 300, 12, 5), (64, 48, 2024, 16)])
def test_equals_pix2struct_image_processor(height, width, budget, size):
    pytest.importorskip("torch")
    from transformers.models.pix2struct.image_processing_pil_pix2struct import Pix2StructImageProcessorPil
    processor = Pix2StructImageProcessorPil(max_patches=budget, patch_size={"height": size, "width": size})
    image = picture(height, width)
    expected = processor(Image.fromarray(image), return_tensors="np")["flattened_patches"][0]
    ours = FlexiblePatches(budget, size)(image)
    assert ours.shape == expected.shape == (budget, 2 + 3 * size * size) and ours.dtype == np.float32
    np.testing.assert_array_equal(ours[:, :2], expected[:, :2])
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_rows_times_columns_stay_in_the_budget():
    rng = np.random.default_rng(1)
    for _ in range(500):
        operation = FlexiblePatches(int(rng.integers(1, 3000)), int(rng.integers(1, 40)))
        height, width = (int(n) for n in rng.integers(1, 4000, 2))
        rows, columns = operation.grid(height, width)
        # a strip thinner than a patch is stretched to one row, and then its length is held to the budget
        assert rows >= 1 and columns >= 1 and rows * columns <= operation.max_patches


def test_padding_is_zero_and_a_plain_picture_finite():
    operation = build("image", [["flexible_patches", {"max_patches": 7, "patch_size": 3}]])[0]
    patches = operation(np.full((9, 9, 3), 200, np.uint8))
    assert operation.grid(9, 9) == (2, 2) and np.isfinite(patches).all()
    assert (patches[:4, :2] > 0).all() and not patches[4:].any()


@pytest.mark.parametrize("settings", [dict(max_patches=0), dict(patch_size=1.5)])
def test_errors(settings):
    with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
        FlexiblePatches(**settings)


def test_blank_shows_nothing_and_keeps_the_shape():
    operations = build("image", [["decode", {}], ["resize", {"size": 5}], ["value_range", {"low": -2.0, "high": 0.0}], ["blank", {}]])
    value = picture(9, 9)
    for operation in operations:
        value = operation(value)
    assert value.shape == (5, 5, 3) and value.dtype == np.float32 and not value.any()
