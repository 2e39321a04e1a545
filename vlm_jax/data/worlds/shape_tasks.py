"""Tasks on the shapes world: captions, questions and boxes, each record a picture, a prompt and the texts that answer it.

    source = questions_source("heldout_pairs", objects=(1, 3))
    source[0] -> {"image": ..., "prompt": "what color is the star?", "texts": ["blue"], "task": "color", ...}

The scenes are those of `shapes_source`. Training names no held-out pair, neither in pictures nor in prompts nor in answers, and what a question asks
about is drawn so that each answer of its kind is about equally frequent. Colours and shapes are asked for by the other of the two, and by place or "it":
a model that met them by name only would learn which never go together.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.locations import detection_text
from vlm_jax.data.sources import check_index
from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES, Thing, pair_name
from vlm_jax.data.worlds.shapes import HELDOUT_PAIRS, SPLITS, TRAIN_PAIRS, ShapesSource, shapes_source
from vlm_jax.errors import ConfigError, did_you_mean

QUESTIONS = ("color", "shape", "count", "place", "exists")
BOX_TASKS = ("detect", "refer")
NUMBERS = ("no", "one", "two", "three", "four")
# Separates the random draws of a task from those of its scene.
_QUESTION_DRAW, _BOX_DRAW = 101, 102
_APART = 0.1    # how much further left or right than any other the leftmost and rightmost shape lie


class ShapeTaskSource:
    """A task on the scenes of a `ShapesSource`. Record i is a pure function of (seed, split, i)."""
    task = ""

    def __init__(self, scenes: ShapesSource):
        self.scenes, self.split = scenes, scenes.split
        self.name = f"{self.task}/{scenes.split}"

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        record = self.scenes[index]
        return {**record, "objects": [thing.name for thing in self.scenes.scene(index)], **self._ask(index, record)}

    def texts_at(self, index: int) -> list[str]:
        """Returns the right answers of record `index`."""
        return self[index]["texts"]

    def prompt_at(self, index: int) -> str:
        """Returns the prompt of record `index`."""
        return self[index]["prompt"]

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {**self.scenes.details, "task": self.task}

    def _ask(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        """Returns prompt, texts and what else belongs to the task."""
        raise TypeError(f"{type(self).__name__} is no task by itself.")

    def _rng(self, index: int, draw: int) -> np.random.Generator:
        return np.random.default_rng((self.scenes.seed, SPLITS.index(self.split), index, draw))


class CaptionsSource(ShapeTaskSource):
    """Captioning: prompt "caption en"; the texts are the plainest caption, or all of them with `variants`."""
    task = "shapes_captions"

    def __init__(self, scenes: ShapesSource, variants: bool):
        super().__init__(scenes)
        self._variants = variants

    def texts_at(self, index: int) -> list[str]:
        """Returns the captions of record `index` without painting it."""
        texts = self.scenes.texts_at(check_index(index, len(self), self.name))
        return texts if self._variants else texts[:1]

    def prompt_at(self, index: int) -> str:
        return "caption en"

    def _ask(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": self.prompt_at(index), "texts": self.texts_at(index), "task": "caption", "language": "en"}


class QuestionsSource(ShapeTaskSource):
    """Questions about colour, shape, number, place and presence; `task` says which kind a record is."""
    task = "shapes_questions"

    def __init__(self, scenes: ShapesSource, kinds: tuple[str, ...]):
        super().__init__(scenes)
        self._kinds = kinds
        self._pairs = [pair_name(*pair) for pair in (HELDOUT_PAIRS if scenes.split == "heldout_pairs" else TRAIN_PAIRS)]

    def texts_at(self, index: int) -> list[str]:
        """Returns the answer of record `index` without painting it."""
        return self._ask(check_index(index, len(self), self.name), {})["texts"]

    def prompt_at(self, index: int) -> str:
        """Returns the question of record `index` without painting it."""
        return self._ask(check_index(index, len(self), self.name), {})["prompt"]

    def _ask(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        things, rng = self.scenes.scene(index), self._rng(index, _QUESTION_DRAW)
        order = [self._kinds[int(place)] for place in rng.permutation(len(self._kinds))]
        for kind in [*order, "exists"]:     # a scene in which no shape is the only one of its colour is asked something else
            asked = getattr(self, f"_{kind}")(things, rng)
            if asked is not None:
                return {"prompt": asked[0], "texts": [asked[1]], "task": kind}
        raise AssertionError("every scene can be asked what exists")

    def _color(self, things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str] | None:
        asked = [(f"what color is {where}?", thing.color) for thing in things for where in _expressions(things, thing, "color")]
        return _drawn(asked, rng)

    def _shape(self, things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str] | None:
        asked = [(f"what shape is {where}?", thing.shape) for thing in things for where in _expressions(things, thing, "shape")]
        return _drawn(asked, rng)

    def _count(self, things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str]:
        return "how many shapes are there?", NUMBERS[len(things)]

    def _place(self, things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str]:
        thing = _drawn(things, rng)
        return f"where is the {thing.name}?", thing.place

    def _exists(self, things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str]:
        if rng.random() < 0.5:
            return f"is there a {_drawn(things, rng).name}?", "yes"
        return f"is there a {self.absent(things, rng)}?", "no"

    def absent(self, things: Sequence[Thing], rng: np.random.Generator) -> str:
        """Returns a pair of this split that the scene does not show; three in four share a colour or a shape with one that it does."""
        shown = {thing.name for thing in things}
        colors, shapes = {thing.color for thing in things}, {thing.shape for thing in things}
        absent = [name for name in self._pairs if name not in shown]
        near = [name for name in absent if name.split()[0] in colors or name.split()[1] in shapes]
        pool = near if near and rng.random() < 0.75 else absent
        return pool[int(rng.integers(len(pool)))]


class BoxesSource(ShapeTaskSource):
    """Boxes as PaliGemma's location tokens: "detect red circle", "refer the leftmost shape" -> "<loc....><loc....><loc....><loc....> red circle".

    `boxes` is the box that the prompt asks for, float32 [1, 4]: left, top, right, bottom in pixels.
    """
    task = "shapes_boxes"

    def __init__(self, scenes: ShapesSource, kinds: tuple[str, ...]):
        super().__init__(scenes)
        self._kinds = kinds

    def prompt_at(self, index: int) -> str:
        """Returns the prompt of record `index` without painting it."""
        index = check_index(index, len(self), self.name)
        return self._prompt(self.scenes.scene(index), self._rng(index, _BOX_DRAW))[1]

    def _ask(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        things = self.scenes.scene(index)
        kind, prompt, number = self._prompt(things, self._rng(index, _BOX_DRAW))
        box, (height, width) = record["boxes"][number:number + 1], record["image"].shape[:2]
        return {"prompt": prompt, "texts": [detection_text(box, [things[number].name], height, width)], "task": kind, "boxes": box,
                "phrase": prompt.split(" ", 1)[1]}

    def _prompt(self, things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str, int]:
        kind = self._kinds[int(rng.integers(len(self._kinds)))]
        number = int(rng.integers(len(things)))
        if kind == "detect":
            return kind, f"detect {things[number].name}", number
        phrases = _phrases(things, number)
        return kind, f"refer {phrases[int(rng.integers(len(phrases)))]}", number


def _phrases(things: Sequence[Thing], number: int) -> list[str]:
    """Returns expressions that are true of one thing alone."""
    thing, others = things[number], [other for i, other in enumerate(things) if i != number]
    phrases = [f"the {thing.name}"]
    for same, phrase in (("color", f"the {thing.color} shape"), ("shape", f"the {thing.shape}")):
        if all(getattr(other, same) != getattr(thing, same) for other in others):
            phrases.append(phrase)
    if others and all(other.place != thing.place for other in others):
        phrases.append(f"the shape at the {thing.place}")
    if others and all(thing.x < other.x - _APART for other in others):
        phrases.append("the leftmost shape")
    if others and all(thing.x > other.x + _APART for other in others):
        phrases.append("the rightmost shape")
    return phrases


def _expressions(things: Sequence[Thing], thing: Thing, asked: str) -> list[str]:
    """Returns expressions that are true of one thing alone and do not say what is `asked`, its "color" or "shape": by the other of the two, and by place."""
    others = [other for other in things if other is not thing]
    found = []
    if asked == "color" and all(other.shape != thing.shape for other in others):
        found.append(f"the {thing.shape}")
    if asked == "shape" and all(other.color != thing.color for other in others):
        found.append(thing.color)
    if not others:
        found.append("it")
    elif all(other.place != thing.place for other in others):
        found.append(f"at the {thing.place}")
    return found


def _drawn(things: Sequence[Any], rng: np.random.Generator) -> Any | None:
    return things[int(rng.integers(len(things)))] if things else None


def captions_source(split: str = "train", count: int | None = None, size: int = 64, objects: int | tuple[int, int] = 1, seed: int = 0,
                    captions: str = "simple", variants: bool = False) -> CaptionsSource:
    """Returns the captioning task; arguments as of `shapes_source`, and `variants`: whether every caption that is right is a target."""
    return CaptionsSource(shapes_source(split, count, size, objects, seed, captions), variants)


def questions_source(split: str = "train", count: int | None = None, size: int = 64, objects: int | tuple[int, int] = (1, 3), seed: int = 0,
                     kinds: Sequence[str] = QUESTIONS) -> QuestionsSource:
    """Returns the questions; arguments as of `shapes_source`, and `kinds`: which questions are asked.

    Raises:
      ConfigError: for an unknown kind, or arguments that `shapes_source` refuses.
    """
    # A single shape is drawn small or large, in one of nine places, so that where it is can be asked.
    single = objects in (1, [1, 1], (1, 1))
    scenes = shapes_source(split, count, size, objects, seed, "detailed" if single else "simple")
    return QuestionsSource(scenes, _check_kinds(kinds, QUESTIONS, "shapes_questions"))


def boxes_source(split: str = "train", count: int | None = None, size: int = 64, objects: int | tuple[int, int] = (1, 3), seed: int = 0,
                 kinds: Sequence[str] = BOX_TASKS) -> BoxesSource:
    """Returns the boxes; arguments as of `shapes_source`, and `kinds`: "detect" by name, "refer" by an expression that is true of one shape alone."""
    single = objects in (1, [1, 1], (1, 1))
    scenes = shapes_source(split, count, size, objects, seed, "detailed" if single else "simple")
    return BoxesSource(scenes, _check_kinds(kinds, BOX_TASKS, "shapes_boxes"))


def _check_kinds(kinds: Any, known: Sequence[str], where: str) -> tuple[str, ...]:
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f'{where}.kinds: "{kind}" is unknown.{did_you_mean(kind, known)}')
    if not kinds:
        raise ConfigError(f"{where}.kinds is empty; name at least one of {', '.join(known)}.")
    return kinds


def answers() -> dict[str, tuple[str, ...]]:
    """Returns what each kind of question can be answered with."""
    places = tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right"))
    return {"color": tuple(COLORS), "shape": SHAPES, "count": NUMBERS[1:], "exists": ("yes", "no"),
            "place": (*places, "top", "bottom", "left", "right", "middle")}
