"""Boxes as text: `<loc0000>` .. `<loc1023>`, four a box, top, left, bottom, right in 1024ths of the picture (PaliGemma, section 3.2.5), and their overlap."""
from collections.abc import Sequence
import re

from vlm_jax.errors import DataError

STEPS = 1024
_BOX = re.compile(r"<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>")
Box = tuple[float, float, float, float]   # top, left, bottom, right, as shares of the picture


def parse_boxes(text: str) -> list[Box]:
    """Returns the boxes of a text, in order. Four places are a box if each is below 1024 and bottom and right lie beyond top and left."""
    boxes = []
    for match in _BOX.finditer(text):
        top, left, bottom, right = (int(group) for group in match.groups())
        if max(top, left, bottom, right) < STEPS and bottom > top and right > left:
            boxes.append((top / STEPS, left / STEPS, bottom / STEPS, right / STEPS))
    return boxes


def box_text(box: Sequence[float]) -> str:
    """Returns a box (shares of the picture) as four location tokens, each the nearest step."""
    return "".join(f"<loc{min(STEPS - 1, max(0, round(value * STEPS))):04d}>" for value in box)


def iou(a: Box, b: Box) -> float:
    """Returns the area of the intersection over that of the union; 0 where either has no area."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, height) * max(0.0, width)
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared) if min(areas) > 0 else 0.0


def referring(predictions: Sequence[str], targets: Sequence[str], threshold: float = 0.5) -> tuple[dict[str, float], list[float]]:
    """Scores of the first box of each answer against that of each target, as RefCOCO counts: one expression, one box (Yu et al. 2016).

    Returns:
      ({"iou@0.5": share of answers whose overlap is at least the threshold, "mean_iou", "unparsed": share without a box, which counts as overlap 0}, the
      overlap of each).
    Raises:
      DataError: for a target without a box, or lists of different lengths.
    """
    if len(predictions) != len(targets) or not targets:
        raise DataError(f"referring: {len(predictions)} answers to {len(targets)} expressions; give one for each of at least one.")
    overlaps, unparsed = [], 0
    for number, (text, target) in enumerate(zip(predictions, targets)):
        truth, answer = parse_boxes(target), parse_boxes(text)
        if not truth:
            raise DataError(f"referring: the target of expression {number} holds no box ({target!r:.60}); write it as <locYYYY><locXXXX><locYYYY><locXXXX>.")
        overlaps.append(iou(answer[0], truth[0]) if answer else 0.0)
        unparsed += not answer
    count = len(overlaps)
    return {f"iou@{threshold:g}": sum(overlap >= threshold for overlap in overlaps) / count, "mean_iou": sum(overlaps) / count,
            "unparsed": unparsed / count}, overlaps
