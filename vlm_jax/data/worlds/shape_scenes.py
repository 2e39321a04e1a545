"""Scenes of coloured shapes: what is in a scene (drawn from a random generator), its captions, and its picture with boxes."""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
import math
import zlib

import numpy as np

# Ten colours that stay apart from one another and from the light backgrounds; none begins with a vowel, so "a {}" is right for all.
COLORS = {
    "red": (222, 32, 38), "green": (28, 150, 48), "blue": (32, 62, 214), "yellow": (248, 212, 20), "purple": (120, 40, 170),
    "pink": (252, 130, 190), "brown": (122, 70, 28), "black": (22, 22, 24), "gray": (136, 138, 140), "turquoise": (44, 200, 204),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "crescent", "arrow")
SUPERSAMPLING = 3
_COLOR_JITTER = 10
_ROTATION = 12.0
_NOISE = 4.0
# Radius of a ring's hole as part of the ring's.
_HOLE = 0.52
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
# Sides of the shapes as parts of the picture's side.
SIDES = (0.60, 0.85)
_SIZES = {"small": (0.24, 0.32), "large": (0.42, 0.56)}
_CELL_SIDES = (0.30, 0.42)


@dataclass(frozen=True)
class Thing:
    """One shape: its colour and shape by name, centre and side as parts of the picture's side, rotation in degrees, `size` a word or ""."""
    color: str
    shape: str
    x: float
    y: float
    side: float
    angle: float
    size: str = ""

    @property
    def name(self) -> str:
        """Returns "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """Returns where the centre is: "top left", "middle", "bottom right", ..."""
        row, column = _ROWS[_third(self.y)], _COLUMNS[_third(self.x)]
        if (row, column) == ("middle", "center"):
            return "middle"
        return row if column == "center" else column if row == "middle" else f"{row} {column}"


def pair_name(color: int, shape: int) -> str:
    """Returns the class name of a pair of indices: "red circle"."""
    return f"{list(COLORS)[color]} {SHAPES[shape]}"


def draw_scene(rng: np.random.Generator, pairs: Sequence[tuple[int, int]], count: tuple[int, int], detailed: bool) -> list[Thing]:
    """Draws what a scene holds.

    Args:
      pairs: the (colour, shape) indices to choose from; no pair comes twice in a scene.
      count: smallest and largest number of shapes, at most four.
      detailed: for a single shape, vary size and place so much that captions can name them.
    """
    number = int(rng.integers(count[0], count[1] + 1))
    chosen = rng.choice(len(pairs), size=number, replace=False)
    if count == (1, 1):
        return [_single(rng, pairs[int(chosen[0])], detailed)]
    cells = rng.permutation(4)[:number]
    things = []
    for pair, cell in zip(chosen, cells):
        color, shape = pairs[int(pair)]
        side = rng.uniform(*_CELL_SIDES)
        x, y = ((0.25 + 0.5 * position) + rng.uniform(-1, 1) * (0.24 - side / 2) for position in (cell % 2, cell // 2))
        things.append(Thing(list(COLORS)[color], SHAPES[shape], float(x), float(y), float(side), float(rng.uniform(-_ROTATION, _ROTATION))))
    return sorted(things, key=lambda thing: thing.x)


def scene_captions(things: Sequence[Thing], detailed: bool) -> list[str]:
    """Returns the captions of a scene; the first is the plainest of its kind."""
    names = [thing.name for thing in things]
    if len(things) == 1:
        thing = things[0]
        if not detailed:
            return [f"a {thing.name}", thing.name, f"a picture of a {thing.name}", f"the {thing.shape} is {thing.color}", f"one {thing.name}"]
        whole = f"{thing.size} {thing.name}".strip()
        return [f"a {whole} at the {thing.place}", f"at the {thing.place} there is a {whole}", f"{whole}, {thing.place}"]
    listed = _listed([f"a {name}" for name in names])
    if not detailed:
        return [listed, f"a picture of {listed}", _listed(names)]
    first, last = things[0], things[-1]
    if len(things) > 2:
        return [_listed([f"a {thing.name} at the {thing.place}" for thing in things])]
    relations = []
    if last.x - first.x > 0.2:
        relations += [f"a {first.name} to the left of a {last.name}", f"a {last.name} to the right of a {first.name}"]
    if abs(first.y - last.y) > 0.2:
        upper, lower = (first, last) if first.y < last.y else (last, first)
        relations += [f"a {upper.name} above a {lower.name}", f"a {lower.name} below a {upper.name}"]
    return relations


def scene_group(things: Sequence[Thing], detailed: bool) -> int:
    """Returns a number that is equal for scenes to which the same captions apply."""
    # Relations depend on all things at once, so their captions decide; names alone are the same in any order.
    words = scene_captions(things, True) if detailed else sorted(thing.name for thing in things)
    return zlib.crc32("|".join(words).encode()) & 0x7FFFFFFF


def paint_scene(rng: np.random.Generator, things: Sequence[Thing], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paints a scene on a light, slightly noisy background.

    Returns:
      uint8 [size, size, 3] and float32 [N, 4]: left, top, right, bottom of each shape in pixels, the smallest whole pixels that hold it.
    """
    from PIL import Image, ImageDraw
    canvas = size * SUPERSAMPLING
    background = tuple(int(v) for v in rng.integers(226, 256, 3))
    image = Image.new("RGB", (canvas, canvas), background)
    draw = ImageDraw.Draw(image)
    boxes = np.zeros((len(things), 4), np.float32)
    for number, thing in enumerate(things):
        color = tuple(int(v) for v in np.clip(np.add(COLORS[thing.color], rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, 3)), 0, 255))
        points = place_outline(thing) * canvas
        draw.polygon(points.ravel().tolist(), fill=color)
        if thing.shape == "ring":
            center = np.multiply((thing.x, thing.y), canvas)
            draw.polygon((center + _HOLE * (points - center)).ravel().tolist(), fill=background)
        low, high = points.min(0) / SUPERSAMPLING, points.max(0) / SUPERSAMPLING
        boxes[number] = np.clip([*np.floor(low + 1e-3), *np.ceil(high - 1e-3)], 0, size)
    small = np.asarray(image.reduce(SUPERSAMPLING), np.float32)
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(_NOISE)
    return np.clip(small + noise, 0, 255).astype(np.uint8), boxes


def place_outline(thing: Thing) -> np.ndarray:
    """Returns the outline of a shape as float [P, 2], x and y as parts of the picture's side."""
    angle = math.radians(thing.angle)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return outline(thing.shape) @ turn * (thing.side / 2) + (thing.x, thing.y)


@cache
def outline(shape: str) -> np.ndarray:
    """Returns the outline of a shape in [-1, 1] x [-1, 1], y downwards: float [P, 2]; a ring's hole is cut when it is painted."""
    turn = np.linspace(0, 2 * np.pi, 49)
    circle = np.stack([np.cos(turn), np.sin(turn)], -1)
    if shape in ("circle", "ring"):
        return circle
    if shape == "crescent":
        # A circle less one of radius 0.86 whose centre is 0.52 to the right; they meet at +-`edge`.
        edge = math.acos((1 + 0.52**2 - 0.86**2) / (2 * 0.52))
        inner_edge = math.atan2(math.sin(edge), math.cos(edge) - 0.52)
        outer, inner = np.linspace(edge, 2 * np.pi - edge, 40), np.linspace(2 * np.pi - inner_edge, inner_edge, 30)
        bow = np.concatenate([np.stack([np.cos(outer), np.sin(outer)], -1), np.stack([0.86 * np.cos(inner) + 0.52, 0.86 * np.sin(inner)], -1)])
        return bow - [(bow[:, 0].max() + bow[:, 0].min()) / 2, 0]
    if shape == "heart":
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        heart = np.stack([16 * np.sin(turn) ** 3, -y], -1) / 16
        return heart - [0, (heart[:, 1].max() + heart[:, 1].min()) / 2]
    if shape == "star":
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        spikes = np.arange(10) * np.pi / 5 - np.pi / 2
        return np.stack([radius * np.cos(spikes), radius * np.sin(spikes)], -1)
    a = 0.3
    return np.array({
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0, -0.92), (1, 0.86), (-1, 0.86)],
        "cross": [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)],
        "diamond": [(0, -1), (0.6, 0), (0, 1), (-0.6, 0)],
        "arrow": [(-1, -0.26), (0.1, -0.26), (0.1, -0.78), (1, 0), (0.1, 0.78), (0.1, 0.26), (-1, 0.26)],
    }[shape])


def _single(rng: np.random.Generator, pair: tuple[int, int], detailed: bool) -> Thing:
    color, shape = list(COLORS)[pair[0]], SHAPES[pair[1]]
    angle = float(rng.uniform(-_ROTATION, _ROTATION))
    if not detailed:
        side = rng.uniform(*SIDES)
        free = (1 - side) / 2 * 0.8
        x, y = 0.5 + rng.uniform(-free, free, 2)
        return Thing(color, shape, float(x), float(y), float(side), angle)
    size = list(_SIZES)[int(rng.integers(len(_SIZES)))]
    side = rng.uniform(*_SIZES[size])
    x, y = (_in_third(rng, int(third), side / 2) for third in rng.integers(0, 3, 2))
    return Thing(color, shape, x, y, float(side), angle, size)


def _in_third(rng: np.random.Generator, third: int, half: float) -> float:
    """A coordinate in the left, middle or right part, such that a shape of half its side stays in the picture."""
    low, high = ((half + 0.01, 0.35), (0.46, 0.54), (0.65, 0.99 - half))[third]
    return float(rng.uniform(low, high))


def _third(coordinate: float) -> int:
    return 0 if coordinate < 0.4 else 2 if coordinate > 0.6 else 1


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
