"""Synthetic user interfaces: what is on a screen (drawn from a random generator), and its picture with the boxes of its elements.

A screen is a bar with a title, then rows from top to bottom: list items with an icon and a text, fields to write in, pictures, texts, and buttons at the
end. Texts are "verb noun" labels; which labels a split may use is a hash of the label. The font is Pillow's own, so neither network nor system fonts
are needed.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
import hashlib
from typing import Any

import numpy as np

from vlm_jax.data.worlds.shape_scenes import COLORS, Thing, place_outline
from vlm_jax.errors import DataError

VERBS = ("open", "save", "send", "find", "share", "edit", "copy", "move", "print", "close", "start", "stop", "check", "sort", "mark", "load")
NOUNS = ("file", "map", "photo", "song", "note", "mail", "list", "page", "order", "ticket", "group", "chat", "video", "clock", "task", "bill",
         "menu", "game", "news", "card", "train", "hotel", "book", "lamp")
ICONS = ("star", "heart", "arrow", "cross", "circle", "diamond", "ring", "crescent")
CLASSES = ("TEXT", "LIST_ITEM", "PICTOGRAM", "INPUT", "IMAGE", "BUTTON")
SPLITS = ("train", "validation", "test")
_SHARES = {"validation": 0.1, "test": 0.2}
_SALT = "vlm_jax screens 1"
_PICTURES = ("circle", "square", "triangle", "star", "heart")
# Lightness of (background, bar, line, ink) of the two themes.
_THEMES = (((250, 250, 250), (225, 230, 240), (190, 195, 205), (25, 25, 30)), ((40, 42, 48), (65, 70, 82), (100, 104, 112), (235, 235, 235)))


@dataclass
class Element:
    """One element of a screen: its class, what it says or shows, its box (left, top, right, bottom in pixels), and the elements inside it."""
    kind: str
    text: str
    box: tuple[int, int, int, int]
    children: list["Element"] = field(default_factory=list)


def split_of(label: str) -> str:
    """Returns the split that a label belongs to."""
    place = int.from_bytes(hashlib.sha256(f"{_SALT} {label}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < _SHARES["test"] else "validation" if place < _SHARES["test"] + _SHARES["validation"] else "train"


@cache
def labels(split: str) -> tuple[str, ...]:
    """Returns the labels of a split."""
    return tuple(label for label in (f"{verb} {noun}" for verb in VERBS for noun in NOUNS) if split_of(label) == split)


def draw_screen(rng: np.random.Generator, split: str, size: int, aspect: tuple[float, float]) -> tuple[np.ndarray, list[Element]]:
    """Draws a screen.

    Args:
      size: the longer side in pixels.
      aspect: smallest and largest height / width, drawn evenly on a logarithmic scale.
    Returns:
      uint8 [H, W, 3], and its elements from top to bottom.
    Raises:
      DataError: if Pillow has no FreeType and therefore no font.
    """
    from PIL import Image, ImageDraw
    ratio = float(np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1]))))
    height, width = (size, max(16, round(size / ratio))) if ratio >= 1 else (max(16, round(size * ratio)), size)
    background, bar, line, ink = _THEMES[int(rng.integers(2))]
    image = Image.new("RGB", (width, height), background)
    pen = Pen(ImageDraw.Draw(image), rng, width, (background, bar, line, ink), list(rng.permutation(labels(split))))
    elements = [pen.title()]
    kinds = ["list", "list", "input", "image", "text", "button"]
    while (height - pen.top) >= pen.row + pen.gap and len(elements) < 9:
        kind = kinds[int(rng.integers(len(kinds)))] if height - pen.top < 4 * pen.row or len(elements) > 1 else "list"
        made = getattr(pen, f"{kind}_row")(height)
        elements.extend(made)
    return np.asarray(image), elements


class Pen:
    """Draws rows from top to bottom and remembers where the next one begins."""

    def __init__(self, draw: Any, rng: np.random.Generator, width: int, colors: Sequence[tuple[int, int, int]], words: list[str]):
        self.draw, self.rng, self.width, self.words = draw, rng, width, words
        self.background, self.bar, self.line, self.ink = colors
        self.font_size = 11
        self.row, self.gap, self.top = 20, 4, 0

    def title(self) -> Element:
        """The bar at the top."""
        self.draw.rectangle((0, 0, self.width, self.row), fill=self.bar)
        element = self.write((self.gap, 0), "TEXT")
        self.top = self.row + self.gap
        return element

    def write(self, place: tuple[int, int], kind: str, middle: int | None = None, text: str | None = None) -> Element:
        """Writes a label, cut to whole words where the width ends; `middle` centres it there."""
        text = str(self.words.pop()) if text is None else text
        font = load_font(self.font_size)
        room = self.width - place[0] - self.gap
        while " " in text and font.getlength(text) > room:
            text = text.rsplit(" ", 1)[0]
        left = place[0] if middle is None else max(self.gap, int(middle - font.getlength(text) / 2))
        self.draw.text((left, place[1] + 3), text, fill=self.ink, font=font)
        box = self.draw.textbbox((left, place[1] + 3), text, font=font)
        return Element(kind, text, self.inside(box))

    def inside(self, box: Sequence[float]) -> tuple[int, int, int, int]:
        """Returns a box in whole pixels, not beyond the screen's sides."""
        left, top, right, bottom = (round(value) for value in box)
        return max(0, left), max(0, top), min(self.width, max(right, left + 1)), max(bottom, top + 1)

    def figure(self, shape: str, box: tuple[int, int, int, int], color: tuple[int, int, int]) -> None:
        """Fills a box with a shape of the shapes world."""
        left, top, right, bottom = box
        side = min(right - left, bottom - top)
        points = place_outline(Thing("red", shape, 0.5, 0.5, 0.9, 0.0)) * side + ((left + right - side) / 2, (top + bottom - side) / 2)
        self.draw.polygon([(float(x), float(y)) for x, y in points], fill=color)
        if shape == "ring":
            center = np.array([(left + right) / 2, (top + bottom) / 2])
            self.draw.polygon([(float(x), float(y)) for x, y in center + 0.5 * (points - center)], fill=self.background)

    def list_row(self, height: int) -> list[Element]:
        """An item with an icon and a text."""
        top, side = self.top, self.row - 6
        icon = ICONS[int(self.rng.integers(len(ICONS)))]
        place = (self.gap, top + 3, self.gap + side, top + 3 + side)
        self.figure(icon, place, self.ink)
        text = self.write((self.gap * 2 + side, top), "TEXT")
        self.draw.line((self.gap, top + self.row, self.width - self.gap, top + self.row), fill=self.line)
        self.top += self.row + self.gap
        box = (self.gap, top, self.width - self.gap, top + self.row)
        return [Element("LIST_ITEM", "", box, [Element("PICTOGRAM", icon, place), text])]

    def input_row(self, height: int) -> list[Element]:
        """A field to write in."""
        box = (self.gap, self.top, self.width - self.gap, self.top + self.row)
        self.draw.rectangle(box, outline=self.line)
        text = self.write((self.gap * 2, self.top), "TEXT")
        self.top += self.row + self.gap
        return [Element("INPUT", text.text, box)]

    def text_row(self, height: int) -> list[Element]:
        """A text."""
        element = self.write((self.gap, self.top), "TEXT")
        self.top += self.row
        return [element]

    def button_row(self, height: int) -> list[Element]:
        """A button with a label."""
        label = str(self.words.pop())
        width = min(self.width - 2 * self.gap, int(load_font(self.font_size).getlength(label)) + 16)
        left = int(self.rng.integers(self.gap, max(self.gap + 1, self.width - self.gap - width + 1)))
        box = (left, self.top, left + width, self.top + self.row - 2)
        self.draw.rounded_rectangle(box, radius=5, fill=self.bar, outline=self.line)
        text = self.write((left + 4, self.top - 1), "TEXT", middle=left + width // 2, text=label)
        self.top += self.row + self.gap
        return [Element("BUTTON", text.text, box)]

    def image_row(self, height: int) -> list[Element]:
        """A picture of a coloured shape."""
        tall = min(3 * self.row, height - self.top - self.gap, self.width - 2 * self.gap)
        color = list(COLORS)[int(self.rng.integers(len(COLORS)))]
        shape = _PICTURES[int(self.rng.integers(len(_PICTURES)))]
        left = int(self.rng.integers(self.gap, max(self.gap + 1, self.width - self.gap - tall + 1)))
        box = (left, self.top, left + tall, self.top + tall)
        self.draw.rectangle(box, fill=(200, 200, 205))
        self.figure(shape, box, COLORS[color])
        self.top += tall + self.gap
        return [Element("IMAGE", f"{color} {shape}", box)]


@cache
def load_font(size: int) -> Any:
    """Returns Pillow's own font."""
    from PIL import ImageFont, features
    if not features.check("freetype2"):
        raise DataError("screens: this Pillow is built without FreeType and has no font; install Pillow's wheel.")
    return ImageFont.load_default(size)
