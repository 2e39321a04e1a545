"""Scenes: what is drawn is where the boxes say, and captions are true."""
import numpy as np
import pytest

from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES, Thing, outline, paint_scene, place_outline, scene_captions, scene_group


def thing(color="red", shape="circle", x=0.5, y=0.5, side=0.5, angle=0.0, size=""):
    return Thing(color, shape, x, y, side, angle, size)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_square(shape):
    points = outline(shape)
    assert points.ndim == 2 and points.shape[1] == 2 and np.abs(points).max() <= 1.1
    assert (points.max(0) - points.min(0)).max() > 1.7
    assert np.abs(points.max(0) + points.min(0)).max() < 0.25


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [48, 65])
def test_boxes_are_tight(shape, size):
    image, boxes = paint_scene(np.random.default_rng(3), [thing("black", shape, 0.45, 0.55, 0.5, 9.0)], size)
    ink = image.astype(int).mean(-1) < 205
    rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
    left, top, right, bottom = boxes[0]
    assert boxes.dtype == np.float32
    for box, pixel in ((left, columns[0]), (top, rows[0]), (right, columns[-1] + 1), (bottom, rows[-1] + 1)):
        assert abs(box - pixel) <= 1.5
    # Nothing of the shape is outside of its box.
    outside = ink.copy()
    outside[int(top):int(bottom), int(left):int(right)] = False
    assert not outside.any()


def test_shapes_differ_in_pixels():
    pictures = [paint_scene(np.random.default_rng(0), [thing("black", shape, side=0.7)], 48)[0].mean(-1) < 128 for shape in SHAPES]
    for i, first in enumerate(pictures):
        for second in pictures[i + 1:]:
            assert (first ^ second).sum() / (first | second).sum() > 0.15


def test_colors_are_apart():
    colors = np.array(list(COLORS.values()), float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
    assert len(COLORS) == len(SHAPES) == 10
    assert distances[~np.eye(10, dtype=bool)].min() > 80
    assert np.linalg.norm(colors - 255, axis=-1).min() > 100


def test_the_ring_has_a_hole_of_background():
    image, _ = paint_scene(np.random.default_rng(1), [thing("black", "ring")], 48)
    middle, corner = image[22:26, 22:26].mean((0, 1)), image[:4, :4].mean((0, 1))
    np.testing.assert_allclose(middle, corner, atol=6)


def test_rotation_turns_the_outline():
    flat, turned = place_outline(thing(shape="arrow")), place_outline(thing(shape="arrow", angle=90.0))
    np.testing.assert_allclose(np.ptp(flat, 0), np.ptp(turned, 0)[::-1], atol=1e-12)


def test_simple_captions():
    captions = scene_captions([thing()], False)
    assert captions[:3] == ["a red circle", "red circle", "a picture of a red circle"] and "the circle is red" in captions
    two = scene_captions([thing(x=0.2), thing("blue", "star", x=0.8)], False)
    assert two[0] == "a red circle and a blue star"
    three = scene_captions([thing(x=0.2), thing("blue", "star", x=0.8), thing("pink", "heart", x=0.8)], False)
    assert three[0] == "a red circle, a blue star and a pink heart"


@pytest.mark.parametrize("x, y, place", [
    (0.2, 0.2, "top left"), (0.5, 0.5, "middle"), (0.8, 0.5, "right"), (0.5, 0.8, "bottom"), (0.8, 0.8, "bottom right"),
])
def test_detailed_captions_name_size_and_place(x, y, place):
    assert scene_captions([thing(x=x, y=y, size="small")], True)[0] == f"a small red circle at the {place}"


def test_relations():
    beside = scene_captions([thing(x=0.2), thing("blue", "star", x=0.8)], True)
    assert beside == ["a red circle to the left of a blue star", "a blue star to the right of a red circle"]
    above = scene_captions([thing(x=0.5, y=0.8), thing("blue", "star", x=0.55, y=0.2)], True)
    assert above == ["a blue star above a red circle", "a red circle below a blue star"]


def test_groups_are_equal_for_equal_captions():
    circle, star = thing(x=0.2), thing("blue", "star", x=0.8)
    assert scene_group([circle], False) == scene_group([thing(x=0.7, side=0.4)], False) != scene_group([star], False)
    assert scene_group([circle, star], False) == scene_group([star, circle], False)
    assert scene_group([thing(size="small")], True) != scene_group([thing(size="large")], True)
