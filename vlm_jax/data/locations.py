"""Boxes as text: PaliGemma's location tokens and ScreenAI's numbers.

PaliGemma (arXiv 2407.07726) writes a box as four of 1,024 tokens, `<locYMIN><locXMIN><locYMAX><locXMAX>`, then its name; ScreenAI writes x0 x1 y0 y1 as
numbers of 0 ... 999. Boxes here are left, top, right, bottom in pixels.
"""
from collections.abc import Sequence
import re

from jaxtyping import Float
import numpy as np

BINS = 1024
SCREEN_BINS = 1000
TOKENS = "<loc0000..1023>"    # for `tokenizer.added`
_BOX = re.compile(r"<loc(\d{4})>" * 4 + r"([^<;]*)")


def box_tokens(box: Sequence[float], height: int, width: int) -> str:
    """Returns the four location tokens of a box; bin k stands for the place k / 1024 of the side."""
    left, top, right, bottom = box
    return "".join(f"<loc{_bin(value, side, BINS):04d}>" for value, side in ((top, height), (left, width), (bottom, height), (right, width)))


def detection_text(boxes: Sequence[Sequence[float]], names: Sequence[str], height: int, width: int) -> str:
    """Returns boxes with their names as PaliGemma writes them: "<loc....><loc....><loc....><loc....> red circle ; ..."."""
    return " ; ".join(f"{box_tokens(box, height, width)} {name}" for box, name in zip(boxes, names, strict=True))


def parse_detections(text: str, height: int, width: int) -> list[tuple[Float[np.ndarray, "4"], str]]:
    """Returns (box, name) of every complete box in a text, in its order; what is no box is passed over."""
    found = []
    for top, left, bottom, right, name in _BOX.findall(text):
        places = np.array([int(left), int(top), int(right), int(bottom)], np.float64)
        if places.max() < BINS:
            found.append(((places / BINS * (width, height, width, height)).astype(np.float32), name.strip()))
    return found


def screen_numbers(box: Sequence[float], height: int, width: int) -> str:
    """Returns ScreenAI's four numbers of a box: "x0 x1 y0 y1", each 0 ... 999."""
    left, top, right, bottom = box
    return " ".join(str(_bin(value, side, SCREEN_BINS)) for value, side in ((left, width), (right, width), (top, height), (bottom, height)))


def parse_screen_numbers(text: str, height: int, width: int) -> Float[np.ndarray, "4"] | None:
    """Returns the box of the last four numbers of a text, None where there are none."""
    numbers = re.findall(r"(?<!\d)\d{1,3}(?!\d)", text)[-4:]
    if len(numbers) < 4:
        return None
    left, right, top, bottom = (int(number) for number in numbers)
    return (np.array([left, top, right, bottom]) / SCREEN_BINS * (width, height, width, height)).astype(np.float32)


def _bin(value: float, side: int, bins: int) -> int:
    return int(np.clip(round(float(value) / side * bins), 0, bins - 1))
