"""The screens world: synthetic user interfaces and what ScreenAI asks about them.

Baechler et al., "ScreenAI: A Vision-Language Model for UI and Infographics Understanding" (2024), section 3.

    schema     "screen schema"         TEXT open map 21 498 10 62, LIST_ITEM 21 979 125 208 (PICTOGRAM star 21 94 140 198, TEXT send note ...), ...
    ocr        "ocr"                   open map, send note, ...
    question   "how many buttons are there?"                    two
    caption    "describe 21 979 125 208"                        a list item with a star that says send note
    navigate   "select the button that says save file"          click 312 688 833 917

Numbers are x0 x1 y0 y1 in thousandths of the sides. Questions are made by rules, which stand in for the language model of the paper.
"""
from collections.abc import Sequence
import re
from typing import Any

import numpy as np

from vlm_jax.data.locations import screen_numbers
from vlm_jax.data.sources import check_index
from vlm_jax.data.worlds.screen_layout import CLASSES, SPLITS, Element, draw_screen, load_font
from vlm_jax.errors import ConfigError, did_you_mean

TASKS = ("schema", "ocr", "question", "caption", "navigate")
COUNTS = {"train": 20_000, "validation": 1_000, "test": 1_000}
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NAMES = {"TEXT": "text", "LIST_ITEM": "list item", "PICTOGRAM": "icon", "INPUT": "field", "IMAGE": "picture", "BUTTON": "button"}
_ELEMENT = re.compile(r"\s*([A-Z_]+)((?: [a-z]+)*) (\d+) (\d+) (\d+) (\d+)\s*([(),]?)")


class ScreensSource:
    """Records of one split; record i is a pure function of (seed, split, i). Screen n has the records n * len(tasks), ... , one for each task.

    A record has `image` uint8 [H, W, 3] of the screen's own aspect ratio, `prompt`, `texts`, `task`, `boxes` float32 [N, 4] (all elements, or the one that
    the prompt is about), `ocr` (the texts from top to bottom), `schema`.
    """

    def __init__(self, split: str, count: int, size: int, aspect: tuple[float, float], seed: int, tasks: tuple[str, ...]):
        self.name, self.split, self.size, self.aspect, self.seed, self.tasks = f"screens/{split}", split, size, aspect, seed, tasks
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, self._count, self.name)
        image, elements = self.screen(index // len(self.tasks))
        task = self.tasks[index % len(self.tasks)]
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index, 2))
        shape = image.shape[:2]
        prompt, text, about = getattr(self, f"_{task}")(elements, shape, rng)
        boxes = np.array([element.box for element in about], np.float32).reshape(-1, 4)
        return {"image": image, "prompt": prompt, "texts": [text], "task": task, "boxes": boxes,
                "ocr": texts_of_screen(elements), "schema": schema(elements, *shape)}

    def screen(self, number: int) -> tuple[np.ndarray, list[Element]]:
        """Returns the picture and the elements of screen `number`."""
        return draw_screen(np.random.default_rng((self.seed, SPLITS.index(self.split), number, 1)), self.split, self.size, self.aspect)

    def texts_at(self, index: int) -> list[str]:
        """Returns the answer of record `index`."""
        return self[index]["texts"]

    def prompt_at(self, index: int) -> str:
        """Returns the prompt of record `index`."""
        return self[index]["prompt"]

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}] ({self.tasks[index % len(self.tasks)]})"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {"split": self.split, "records": self._count, "size": self.size, "aspect": list(self.aspect), "seed": self.seed, "tasks": list(self.tasks)}

    def _schema(self, elements: list[Element], shape: tuple[int, int], rng: np.random.Generator) -> tuple[str, str, list[Element]]:
        return "screen schema", schema(elements, *shape), flat(elements)

    def _ocr(self, elements: list[Element], shape: tuple[int, int], rng: np.random.Generator) -> tuple[str, str, list[Element]]:
        return "ocr", ", ".join(texts_of_screen(elements)), [element for element in flat(elements) if _says(element)]

    def _question(self, elements: list[Element], shape: tuple[int, int], rng: np.random.Generator) -> tuple[str, str, list[Element]]:
        asked = [("what is the title?", elements[0].text, [elements[0]])]
        for kind in ("LIST_ITEM", "BUTTON", "INPUT", "IMAGE"):
            found = [element for element in elements if element.kind == kind]
            asked.append((f"how many {_NAMES[kind]}s are there?", NUMBERS[len(found)], found))
        for element in elements:
            if element.kind == "LIST_ITEM":
                icon, text = element.children
                asked.append((f"which icon is next to {text.text}?", icon.text, [icon]))
            elif element.kind == "IMAGE" and sum(other.kind == "IMAGE" for other in elements) == 1:
                asked.append(("what does the picture show?", element.text, [element]))
        kinds = sorted({question.split()[0] for question, _, _ in asked})       # first the kind, so that counts do not crowd out the others
        kind = kinds[int(rng.integers(len(kinds)))]
        fitting = [entry for entry in asked if entry[0].startswith(kind)]
        return fitting[int(rng.integers(len(fitting)))]

    def _caption(self, elements: list[Element], shape: tuple[int, int], rng: np.random.Generator) -> tuple[str, str, list[Element]]:
        element = elements[int(rng.integers(len(elements)))]
        return f"describe {screen_numbers(element.box, *shape)}", description(element), [element]

    def _navigate(self, elements: list[Element], shape: tuple[int, int], rng: np.random.Generator) -> tuple[str, str, list[Element]]:
        names = [description(element) for element in elements]
        single = [element for element, name in zip(elements, names) if names.count(name) == 1]
        element = single[int(rng.integers(len(single)))]
        return f"select the {description(element).split(' ', 1)[1]}", f"click {screen_numbers(element.box, *shape)}", [element]


def screens_source(split: str = "train", count: int | None = None, size: int = 160, aspect: Sequence[float] = (0.75, 1.6), seed: int = 0,
                   tasks: Sequence[str] = TASKS) -> ScreensSource:
    """Returns one split of the screens.

    Args:
      split: "train", "validation" or "test"; no label of one stands on a screen of another.
      count: number of records; None is 20,000 for training and 1,000 otherwise.
      size: the longer side in pixels.
      aspect: smallest and largest height / width of a screen, within 0.25 ... 4.
      seed: another seed gives other screens of the same labels.
      tasks: which of `TASKS` the records are, in turn.
    Raises:
      ConfigError: for an unknown split or task, or a number out of range.
      DataError: if Pillow has no font.
    """
    tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    for name, value, known in (("split", split, SPLITS), *(("tasks", task, TASKS) for task in tasks)):
        if value not in known:
            raise ConfigError(f'screens.{name}: "{value}" is unknown.{did_you_mean(value, known)}')
    if not tasks:
        raise ConfigError(f"screens.tasks is empty; name at least one of {', '.join(TASKS)}.")
    count = COUNTS[split] if count is None else count
    for name, value, low in (("count", count, 1), ("size", size, 96), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"screens.{name} is {value!r}; give an integer of at least {low}.")
    numbers = tuple(aspect) if isinstance(aspect, (list, tuple)) else (aspect, aspect)
    if len(numbers) != 2 or not all(isinstance(n, (int, float)) for n in numbers) or not 0.25 <= numbers[0] <= numbers[1] <= 4:
        raise ConfigError(f"screens.aspect is {aspect!r}; give [smallest, largest] height / width, within 0.25 and 4.")
    load_font(11)
    return ScreensSource(split, count, size, numbers, seed, tasks)


def flat(elements: Sequence[Element]) -> list[Element]:
    """Returns all elements, each before those inside it."""
    return [found for element in elements for found in (element, *flat(element.children))]


def texts_of_screen(elements: Sequence[Element]) -> list[str]:
    """Returns what is written on the screen, from top to bottom."""
    return [element.text for element in flat(elements) if _says(element)]


def description(element: Element) -> str:
    """Returns what an element is, in words: "a button that says save file"."""
    name = _NAMES[element.kind]
    if element.kind == "LIST_ITEM":
        icon, text = element.children
        return f"a {name} with a {icon.text} that says {text.text}"
    return f"a {name} of a {element.text}" if element.kind in ("IMAGE", "PICTOGRAM") else f"a {name} that says {element.text}"


def schema(elements: Sequence[Element], height: int, width: int) -> str:
    """Returns the screen schema: class, text and place of every element, separated by commas, with those inside it in parentheses."""
    written = []
    for element in elements:
        words = " ".join(part for part in (element.kind, element.text, screen_numbers(element.box, height, width)) if part)
        written.append(words + (f" ({schema(element.children, height, width)})" if element.children else ""))
    return ", ".join(written)


def parse_schema(text: str, height: int, width: int) -> list[Element] | None:
    """Returns the elements of a schema, with boxes to a thousandth of the sides; None for a text that is no schema."""
    root: list[Element] = []
    stack, place, after = [root], 0, ""
    while place < len(text):
        found = _ELEMENT.match(text, place)
        if found is None or found[1] not in CLASSES:
            return None
        x0, x1, y0, y1 = (int(number) for number in found.groups()[2:6])
        box = tuple(round(value * side / 1000) for value, side in ((x0, width), (y0, height), (x1, width), (y1, height)))
        element = Element(found[1], found[2].strip(), box)
        stack[-1].append(element)
        place, after = found.end(), found[7]
        while after == ")":
            if len(stack) == 1:
                return None
            stack.pop()
            rest = re.compile(r"\s*([),]?)").match(text, place)
            place, after = rest.end(), rest[1]
        if after == "(":
            stack.append(element.children)
        elif after != ",":
            break
    return root if place == len(text) and len(stack) == 1 and root and after != "," else None


def _says(element: Element) -> bool:
    return element.kind in ("TEXT", "INPUT", "BUTTON")
