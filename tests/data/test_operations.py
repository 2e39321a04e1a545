"""Image operations: parity with the published preprocessing, shapes, ranges, randomness, settings."""
import dataclasses
import io

import ml_collections
import numpy as np
from PIL import Image
import pytest

from vlm_jax.data import images, operations
from vlm_jax.data.operations import apply, build
from vlm_jax.errors import ConfigError, DataError

SIZES = [(37, 91), (91, 37), (64, 64), (5, 9), (224, 225), (33, 31)]


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [32, 45])
def test_siglip_preprocessing_matches_transformers(width, height, size):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    image = noise(width, height)
    expected = SiglipImageProcessorPil(size={"height": size, "width": size})(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    listed = [["decode"], ["resize", {"size": size, "method": "bicubic"}], ["value_range", {"low": -1, "high": 1}]]
    for ours in (apply(build("image", listed), image), apply(build("image", [["siglip", {"size": size}]]), Image.fromarray(image))):
        assert ours.dtype == np.float32 and ours.shape == (size, size, 3)
        np.testing.assert_allclose(ours, np.moveaxis(expected, 0, -1), atol=3e-7)


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [32, 45])
def test_clip_preprocessing_matches_transformers(width, height, size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    image = noise(width, height)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    listed = [["resize_shortest", {"size": size}], ["center_crop", {"size": size}], ["value_range", {"low": 0, "high": 1}],
              ["normalize", {"mean": images.CLIP_MEAN, "std": images.CLIP_STD}]]
    for ours in (apply(build("image", listed), image), apply(build("image", [["clip", {"size": size}]]), image)):
        assert ours.dtype == np.float32 and ours.shape == (size, size, 3)
        np.testing.assert_allclose(ours, np.moveaxis(expected, 0, -1), atol=2e-6)


@pytest.mark.parametrize("method", images.METHODS)
def test_resize_methods_and_rectangles(method):
    image = Image.fromarray(noise(31, 17))
    result = np.asarray(images.Resize((11, 7), method)(image))
    np.testing.assert_array_equal(result, np.asarray(image.resize((7, 11), images.METHODS[method])))
    assert images.Resize((17, 31), method)(image) is image


@pytest.mark.parametrize("width, height, expected", [(37, 91, (20, 49)), (91, 37, (49, 20)), (20, 50, (20, 50)), (9, 9, (20, 20)), (3, 4, (20, 26))])
def test_resize_shortest_keeps_the_aspect_ratio(width, height, expected):
    assert images.ResizeShortest(20)(noise(width, height)).size == expected


def test_value_range():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for low, high in ((-1, 1), (0, 1), (-2, 0)):
        values = images.ValueRange(low, high)(image)
        assert values.dtype == np.float32 and values.min() == low and values.max() == high
        np.testing.assert_allclose(values, low + image.astype(np.float64) / 255 * (high - low), atol=3e-7)
    assert image.dtype == np.uint8 and image.max() == 255


def test_center_crop_and_random_crop():
    image = noise(11, 8)
    np.testing.assert_array_equal(images.CenterCrop((3, 4))(image), image[2:5, 3:7])
    np.testing.assert_array_equal(images.RandomCrop((3, 4))(image), image[2:5, 3:7])
    seen = {np.asarray(images.RandomCrop((7, 10))(image, rng(seed))).tobytes() for seed in range(40)}
    assert seen == {np.ascontiguousarray(image[i:i + 7, j:j + 10]).tobytes() for i in range(2) for j in range(2)}
    for crop in (images.CenterCrop(9), images.RandomCrop((8, 12))):
        with pytest.raises(DataError, match="too few") as error:
            crop(image)
        assert error.value.reason == "image_too_small"


@pytest.mark.parametrize("width, height", [(60, 40), (40, 60), (1, 200), (200, 1), (7, 7)])
def test_random_resized_crop(width, height):
    operation = images.RandomResizedCrop(8, area=(0.2, 0.7), ratio=(0.5, 2.0))
    boxes = []
    for seed in range(200):
        left, top, right, bottom = operation.box(width, height, rng(seed))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        boxes.append((left, top, right - left, bottom - top))
    assert operation(noise(width, height), rng()).size == (8, 8)
    if min(width, height) >= 40:
        left, top, w, h = np.array(boxes).T
        share = w * h / (width * height)
        assert 0.18 < share.min() < 0.25 and 0.65 < share.max() < 0.72 and abs(share.mean() - 0.43) < 0.05
        assert 0.48 < (w / h).min() < 0.6 and 1.6 < (w / h).max() < 2.1
        assert len(set(left)) > 15 and len(set(top)) > 15
    whole = images.Resize(8)(noise(width, height))
    np.testing.assert_array_equal(operation(noise(width, height)), whole)


def test_random_resized_crop_resizes_the_part():
    image = noise(40, 30)
    operation = images.RandomResizedCrop(12)
    left, top, right, bottom = operation.box(40, 30, rng(5))
    expected = Image.fromarray(image[top:bottom, left:right]).resize((12, 12), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(operation(image, rng(5)), expected)


@pytest.mark.parametrize("as_pil", [False, True])
def test_flip(as_pil):
    image = noise(5, 3)
    value = Image.fromarray(image) if as_pil else image
    flips = [np.array_equal(images.FlipLeftRight()(value, rng(seed)), image[:, ::-1]) for seed in range(60)]
    assert 18 < sum(flips) < 42
    np.testing.assert_array_equal(images.FlipLeftRight(1.0)(value), image)
    np.testing.assert_array_equal(images.FlipLeftRight(1.0)(value, rng()), image[:, ::-1])
    np.testing.assert_array_equal(images.FlipLeftRight(0.0)(value, rng()), image)


def test_pad_to_square():
    image = noise(5, 2)
    result = np.asarray(images.PadToSquare()(image))
    assert result.shape == (5, 5, 3)
    np.testing.assert_array_equal(result[1:3], image)
    assert (result[[0, 3, 4]] == 255).all()
    assert (np.asarray(images.PadToSquare((1, 2, 3))(noise(2, 4)))[:, 0] == [1, 2, 3]).all()
    square = Image.fromarray(noise(3, 3))
    assert images.PadToSquare()(square) is square


def test_strips_do_not_grow_without_bound():
    strip = np.zeros((1, 30_000, 3), np.uint8)
    for operation in (images.ResizeShortest(224), images.PadToSquare()):
        with pytest.raises(DataError) as error:
            operation(strip)
        assert error.value.reason == "image_too_long"


def test_same_rng_same_picture_and_encoded_equals_array():
    image = noise(50, 40)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    listed = build("image", [["random_resized_crop", {"size": 16}], ["flip_left_right"], ["value_range"]])
    first, second = apply(listed, image, rng(3)), apply(listed, buffer.getvalue(), rng(3))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, apply(listed, image, rng(4)))


@pytest.mark.parametrize("listed, message", [
    ([["resise", {"size": 8}]], r'processor\[0\]: "resise" is unknown. Did you mean "resize"'),
    ([["decode"], ["resize", {"sise": 8}]], r'processor\[1\] \(resize\).sise: Resize takes no such setting. Did you mean "size"'),
    ([["resize"]], r"processor\[0\] \(resize\).size is missing"),
    ([["resize", {"size": 0}]], r"processor\[0\] \(resize\): size must be a positive number"),
    ([["resize", {"size": "big"}]], "size must be"),
    ([["resize", {"size": [3, 4, 5]}]], "size must be"),
    ([["resize", {"size": 8, "method": "cubic"}]], 'method: "cubic" is unknown. Did you mean "bicubic"'),
    ([["resize_shortest", {"size": [3, 4]}]], "one positive number"),
    ([["random_resized_crop", {"size": 8, "area": [0.5, 0.2]}]], "area must be"),
    ([["random_resized_crop", {"size": 8, "ratio": [0, 2]}]], "ratio must be"),
    ([["flip_left_right", {"probability": 2}]], "probability must"),
    ([["pad_to_square", {"color": [0, 0, 256]}]], "color must"),
    ([["value_range", {"low": 1, "high": 0}]], "low must be less"),
    ([["value_range", {"low": "a", "high": 0}]], "processor"),
    ([["normalize", {"std": [1, 0, 1]}]], "std positive"),
    ([["resize", 8]], "must be"), ([[]], "must be"), ([3], "must be"), ("resize", "must be a list"), ([["resize", {"size": 8}, 1]], "must be"),
])
def test_settings_are_checked(listed, message):
    with pytest.raises(ConfigError, match=message) as error:
        build("image", listed, "processor")
    assert "\n" not in str(error.value)


def test_order_mistakes_say_what_to_do():
    floats = images.ValueRange()(noise(4, 4))
    with pytest.raises(ConfigError, match="before value_range"):
        images.Resize(3)(floats)
    with pytest.raises(ConfigError, match="once"):
        images.ValueRange()(floats)
    with pytest.raises(ConfigError, match="value_range with low=0"):
        images.Normalize()(noise(4, 4))


def test_config_dicts_and_short_forms():
    config = ml_collections.ConfigDict({"image": [["decode", {"max_pixels": 99}], "flip_left_right", ("resize", {"size": (4, 6)})]})
    built = build("image", config.image)
    assert [type(operation).__name__ for operation in built] == ["Decode", "FlipLeftRight", "Resize"]
    assert built[0].max_pixels == 99 and apply(built, noise(9, 9)).size == (6, 4)


def test_register_adds_and_does_not_replace():
    try:
        @operations.register("image", "test_invert")
        @dataclasses.dataclass(frozen=True)
        class Invert:
            def __call__(self, image, rng=None):
                return 255 - images.as_array(image)
        np.testing.assert_array_equal(apply(build("image", ["test_invert"]), noise(3, 3)), 255 - noise(3, 3))
        with pytest.raises(ConfigError, match="exists already"):
            operations.register("image", "resize")(Invert)
    finally:
        operations.operations("image").pop("test_invert", None)
