"""Clips of moving shapes."""
import pickle

import numpy as np
import pytest

from vlm_jax.data.sources import Source, build_source
from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES
from vlm_jax.data.worlds.shape_videos import MOTIONS, videos_source
from vlm_jax.data.worlds.shapes import HELDOUT_PAIRS
from vlm_jax.errors import ConfigError


def centre(frame):
    """Where the shape is: the mean place of what differs from the corner's colour."""
    different = np.abs(frame.astype(int) - frame[0, 0].astype(int)).sum(-1) > 90
    rows, columns = np.nonzero(different)
    return columns.mean(), rows.mean(), different.sum()


@pytest.mark.parametrize("motion, axis, sign", [("to the left", 0, -1), ("to the right", 0, 1), ("up", 1, -1), ("down", 1, 1), ("growing", 2, 1),
                                                ("shrinking", 2, -1)])
def test_shapes_move_as_the_caption_says(motion, axis, sign):
    source = videos_source(size=32, frames=5, motions=motion)
    for i in range(4):
        record = source[i]
        places = np.array([centre(frame)[axis] for frame in record["frames"]])
        assert (sign * np.diff(places) > 0).all() and record["frames"].shape == (5, 32, 32, 3) and record["frames"].dtype == np.uint8
        assert record["texts"] == source.texts_at(i) and MOTIONS[motion][0] in record["texts"][0] and record["attributes"]["motion"] == motion


def test_turns_stillness_splits_and_purity():
    still, turning = videos_source(motions="still")[0]["frames"], videos_source(motions=("clockwise", "counterclockwise"))
    assert (still == still[0]).all()
    seen = set()
    for i in range(40):
        record = turning[i]
        seen.add(record["attributes"]["motion"])
        round_one = record["attributes"]["shape"] in ("circle", "ring")
        assert (record["attributes"]["motion"] == "still") == round_one and ((record["frames"] == record["frames"][0]).all() == round_one)
    assert seen == {"clockwise", "counterclockwise", "still"}
    source = build_source({"name": "shapes_videos", "split": "heldout_pairs", "frames": 2, "count": 40})
    held = {f"{list(COLORS)[color]} {SHAPES[shape]}" for color, shape in HELDOUT_PAIRS}
    assert isinstance(source, Source) and all(source[i]["concept"].split(",")[0] in held for i in range(40))
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  (our own bytes)
    assert np.array_equal(again[7]["frames"], source[7]["frames"]) and source.details["frames"] == 2 and source.describe(7).endswith("[7]")


@pytest.mark.parametrize("wrong, message", [(dict(motions=["sideways"]), "motions"), (dict(motions=[]), "empty"), (dict(frames=1), "frames"),
                                            (dict(split="x"), "split")])
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        videos_source(**wrong)
