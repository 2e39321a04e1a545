"""Short clips of one moving shape, with captions of the motion: video-text pairs.

    source = videos_source("heldout_pairs", frames=6)
    source[0] -> {"frames": uint8 [6, 32, 32, 3], "prompt": "", "texts": ["a red star moves to the left", ...], "attributes": {"motion": "to the left", ...}}

A motion and its opposite show the same pictures in another order, so that a caption cannot be told from any single one. Record i is a pure function of
(seed, split, i); splits and pairs are those of `shapes`.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.sources import check_index
from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES, Thing, paint_scene
from vlm_jax.data.worlds.shapes import COUNTS, HELDOUT_PAIRS, SPLITS, TRAIN_PAIRS
from vlm_jax.errors import ConfigError, did_you_mean

# Each motion: what is said of it, and (x, y, side) at the beginning and at the end; None is drawn and stays.
MOTIONS = {
    "to the left": ("moves to the left", (0.76, None, None), (0.24, None, None)),
    "to the right": ("moves to the right", (0.24, None, None), (0.76, None, None)),
    "up": ("moves up", (None, 0.76, None), (None, 0.24, None)), "down": ("moves down", (None, 0.24, None), (None, 0.76, None)),
    "growing": ("grows", (None, None, 0.26), (None, None, 0.52)), "shrinking": ("shrinks", (None, None, 0.52), (None, None, 0.26)),
    "clockwise": ("turns clockwise", (None,) * 3, (None,) * 3), "counterclockwise": ("turns counterclockwise", (None,) * 3, (None,) * 3),
    "still": ("stays where it is", (None,) * 3, (None,) * 3),
}
# Degrees a frame, below half of the angle by which any shape but circle and ring turns into itself.
_TURN = 25.0
_TURNS = {"clockwise": _TURN, "counterclockwise": -_TURN}
_ROUND = ("circle", "ring")
_DRAW = 301


class ShapeVideos:
    """Clips of one split, drawn on demand; a record has `frames`, `prompt` "", `texts`, `attributes` {color, shape, motion}, `concept` and `group`."""

    def __init__(self, split: str, count: int, size: int, frames: int, seed: int, motions: tuple[str, ...]):
        self.name, self.split, self.size, self.frames, self.seed = f"shapes_videos/{split}", split, size, frames, seed
        self._count, self._motions = count, motions
        self._pairs = HELDOUT_PAIRS if split == "heldout_pairs" else TRAIN_PAIRS

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        things, motion, seed = self._draw(index)
        # One generator's draws for all frames: background, colour and grain stay as they are while the shape moves.
        clip = np.stack([paint_scene(np.random.default_rng(seed), [thing], self.size)[0] for thing in things])
        thing = things[0]
        return {"frames": clip, "prompt": "", "texts": _captions(thing, motion), "attributes": {"color": thing.color, "shape": thing.shape, "motion": motion},
                "concept": f"{thing.name}, {motion}", "task": "caption",
                "group": len(SHAPES) * len(COLORS) * list(MOTIONS).index(motion) + len(SHAPES) * list(COLORS).index(thing.color) + SHAPES.index(thing.shape)}

    def texts_at(self, index: int) -> list[str]:
        """Returns the captions of record `index` without painting it."""
        things, motion, _ = self._draw(index)
        return _captions(things[0], motion)

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these clips."""
        return {"split": self.split, "records": self._count, "size": self.size, "frames": self.frames, "seed": self.seed, "motions": list(self._motions)}

    def _draw(self, index: int) -> tuple[list[Thing], str, tuple[int, ...]]:
        """Returns what each frame shows, the motion, and the seed of what is painted around it."""
        key = (self.seed, SPLITS.index(self.split), check_index(index, self._count, self.name), _DRAW)
        rng = np.random.default_rng(key)
        color, shape = self._pairs[int(rng.integers(len(self._pairs)))]
        known = [motion for motion in self._motions if motion not in _TURNS or SHAPES[shape] not in _ROUND]
        motion = known[int(rng.integers(len(known)))] if known else "still"
        drawn = (rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6), rng.uniform(0.34, 0.42))
        angle = rng.uniform(-12, 12)
        _, first, last = MOTIONS[motion]
        things = []
        for frame in range(self.frames):
            part = frame / (self.frames - 1)
            x, y, side = (stays if begin is None else begin + part * (end - begin) for stays, begin, end in zip(drawn, first, last))
            things.append(Thing(list(COLORS)[color], SHAPES[shape], x, y, side, angle - _TURNS.get(motion, 0.0) * frame))
        return things, motion, (*key, 1)


def _captions(thing: Thing, motion: str) -> list[str]:
    said = MOTIONS[motion][0]
    return [f"a {thing.name} {said}", f"the {thing.shape} {said}", f"a video of a {thing.name} that {said}"]


def videos_source(split: str = "train", count: int | None = None, size: int = 32, frames: int = 4, seed: int = 0,
                  motions: Sequence[str] = tuple(MOTIONS)) -> ShapeVideos:
    """Returns the clips of one split.

    Args:
      split, count, size, seed: as of `shapes_source`.
      frames: pictures of a clip, at least 2.
      motions: which of `MOTIONS`, equally often; circles and rings are never seen to turn.
    Raises:
      ConfigError: for an unknown split or motion, or a number out of range.
    """
    motions = (motions,) if isinstance(motions, str) else tuple(motions)
    for name, value, known in (("split", split, SPLITS), *(("motions", motion, MOTIONS) for motion in motions)):
        if value not in known:
            raise ConfigError(f"shapes_videos.{name}: {value!r} is unknown.{did_you_mean(value, known)}")
    if not motions:
        raise ConfigError(f"shapes_videos.motions is empty; name at least one of {', '.join(MOTIONS)}.")
    count = COUNTS[split] if count is None else count
    for name, value, low in (("count", count, 1), ("size", size, 8), ("frames", frames, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"shapes_videos.{name} is {value!r}; give an integer of at least {low}.")
    return ShapeVideos(split, count, size, frames, seed, motions)
