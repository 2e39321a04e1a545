"""The shapes world: 10 colours x 10 shapes, drawn when asked for, with captions, boxes and pairs that training never sees.

    source = shapes_source("heldout_pairs", size=48)
    source[0] -> {"image": uint8 [48, 48, 3], "texts": ["a red star", ...], "label": 3, "attributes": {"color": "red", "shape": "star"},
                  "boxes": float32 [1, 4], "group": ..., "concept": "red star"}

Record i is a pure function of (seed, split, i), so nothing is stored. Of the 100 pairs, 20 are held out as two diagonals of the table: each colour
and each shape is in exactly 2 held-out pairs and in 8 of training.
"""
from typing import Any

import numpy as np

from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES, Thing, draw_scene, paint_scene, pair_name, scene_captions, scene_group
from vlm_jax.errors import ConfigError, did_you_mean

SPLITS = ("train", "validation", "heldout_pairs")
COUNTS = {"train": 50_000, "validation": 2_000, "heldout_pairs": 2_000}
PROMPTS = ("a {}", "{}", "a picture of a {}")
CAPTIONS = ("simple", "detailed")
_DIAGONALS = (3, 7)
HELDOUT_PAIRS = tuple((color, shape) for color in range(len(COLORS)) for shape in range(len(SHAPES)) if (shape - color) % len(SHAPES) in _DIAGONALS)
TRAIN_PAIRS = tuple((color, shape) for color in range(len(COLORS)) for shape in range(len(SHAPES)) if (shape - color) % len(SHAPES) not in _DIAGONALS)


def class_names() -> list[str]:
    """Returns the 100 class names, "red circle" first; the label of a pair is 10 * colour + shape."""
    return [pair_name(color, shape) for color in range(len(COLORS)) for shape in range(len(SHAPES))]


class ShapesSource:
    """Scenes of one split, drawn on demand.

    A record has `image` uint8 [size, size, 3]; `texts`; `boxes` float32 [N, 4] (left, top, right, bottom in pixels); `attributes`; `group` (int,
    equal where the same captions apply); `concept`, the names of the shapes. Scenes of one shape have `label` and attributes {color, shape} (and
    {size, place} with detailed captions), others attributes {objects: [{color, shape}, ...]} in the order of the boxes, from left to right.
    """

    def __init__(self, split: str, count: int, size: int, objects: tuple[int, int], seed: int, captions: str):
        self.name, self.split, self.size, self.seed = f"shapes/{split}", split, size, seed
        self.class_names, self.prompts = class_names(), PROMPTS
        self._count, self._objects, self._detailed = count, objects, captions == "detailed"
        self._pairs = HELDOUT_PAIRS if split == "heldout_pairs" else TRAIN_PAIRS

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        things, rng = self._scene(index)
        image, boxes = paint_scene(rng, things, self.size)
        record = {
            "image": image, "texts": scene_captions(things, self._detailed), "boxes": boxes, "attributes": self._attributes(things),
            "group": scene_group(things, self._detailed), "concept": ", ".join(sorted(thing.name for thing in things)),
        }
        if self._objects == (1, 1):
            record["label"] = 10 * list(COLORS).index(things[0].color) + SHAPES.index(things[0].shape)
        return record

    def texts_at(self, index: int) -> list[str]:
        """Returns the captions of record `index` without painting it."""
        return scene_captions(self._scene(index)[0], self._detailed)

    def scene(self, index: int) -> list[Thing]:
        """Returns what record `index` shows."""
        return self._scene(index)[0]

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these pictures."""
        return {"split": self.split, "records": self._count, "size": self.size, "objects": list(self._objects), "seed": self.seed,
                "captions": CAPTIONS[self._detailed]}

    def _scene(self, index: int) -> tuple[list[Thing], np.random.Generator]:
        if not -self._count <= index < self._count:
            raise IndexError(f"{self.name} has {self._count} records, so there is no record {index}.")
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), int(index) % self._count))
        return draw_scene(rng, self._pairs, self._objects, self._detailed), rng

    def _attributes(self, things: list[Thing]) -> dict[str, Any]:
        if self._objects != (1, 1):
            return {"objects": [{"color": thing.color, "shape": thing.shape} for thing in things]}
        thing = things[0]
        attributes = {"color": thing.color, "shape": thing.shape}
        return {**attributes, "size": thing.size, "place": thing.place} if self._detailed else attributes


def shapes_source(split: str = "train", count: int | None = None, size: int = 64, objects: int | tuple[int, int] = 1, seed: int = 0,
                  captions: str = "simple") -> ShapesSource:
    """Returns one split of the shapes world.

    Args:
      split: "train" and "validation" (other scenes) draw from the 80 pairs of training, "heldout_pairs" from the 20 others.
      count: number of scenes; None is 50,000 for training and 2,000 otherwise.
      size: side of the pictures in pixels.
      objects: shapes in a scene: a number, or (smallest, largest), at most 4.
      seed: another seed gives other scenes of the same pairs.
      captions: "simple" names colour and shape; "detailed" adds size and place, or how several shapes lie.
    Raises:
      ConfigError: for an unknown split or style of captions, or a number out of range.
    """
    for name, value, known in (("split", split, SPLITS), ("captions", captions, CAPTIONS)):
        if value not in known:
            raise ConfigError(f'shapes.{name}: "{value}" is unknown.{did_you_mean(value, known)}')
    count = COUNTS[split] if count is None else count
    for name, value, low in (("count", count, 1), ("size", size, 8), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"shapes.{name} is {value!r}; give an integer of at least {low}.")
    numbers = (objects, objects) if isinstance(objects, int) else tuple(objects) if isinstance(objects, (list, tuple)) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) for n in numbers) or not 1 <= numbers[0] <= numbers[1] <= 4:
        raise ConfigError(f"shapes.objects is {objects!r}; give a number from 1 to 4, or [smallest, largest] of them.")
    return ShapesSource(split, count, size, numbers, seed, captions)
