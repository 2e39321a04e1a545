"""The pictures of an evaluation: queries with their best answers, recall curves, confusions. The first queries are shown, not chosen ones."""
from collections.abc import Mapping, Sequence
import io
import os
import textwrap
from typing import Any
import warnings

import numpy as np

from vlm_jax import storage

QUERIES = 8
ANSWERS = 6
SHOTS = 6
RIGHT, WRONG, INK, GREY, GRID = "#1a7f37", "#c9ccd1", "#24292f", "#57606a", "#d0d7de"


def text_to_image(path: str | os.PathLike, predictions: Sequence[Mapping[str, Any]], thumbnails: Mapping[int, Any]) -> None:
    """Draws a row a text: the text, then its best pictures, right ones framed in green."""
    chosen = predictions[:QUERIES]
    figure, axes = _grid(len(chosen), 1 + ANSWERS, widths=[2.6] + [1] * ANSWERS)
    for row, line in zip(axes, chosen):
        _words(row[0], [(line["query"]["text"], INK, "bold"), (f"rank {line['rank']}", INK, "normal")])
        for cell, answer in zip(row[1:], line["answers"]):
            _picture(cell, thumbnails[answer["index"]], RIGHT if answer["right"] else WRONG, 3 if answer["right"] else 1)
    _save(figure, path)


def image_to_text(path: str | os.PathLike, predictions: Sequence[Mapping[str, Any]], thumbnails: Mapping[int, Any]) -> None:
    """Draws pictures with their best texts, right ones in green."""
    chosen = predictions[:QUERIES]
    rows = -(-len(chosen) // 2)
    figure, axes = _grid(rows, 4, widths=[1, 3, 1, 3])
    for number, line in enumerate(chosen):
        cells = axes[number % rows][2 * (number // rows):]
        _picture(cells[0], thumbnails[line["query"]["index"]], WRONG, 1)
        _words(cells[1], [(f"{answer['score']:.2f}  {answer['text']}", RIGHT if answer["right"] else INK, "bold" if answer["right"] else "normal")
                          for answer in line["answers"][:3]])
    _save(figure, path)


def classified(path: str | os.PathLike, predictions: Sequence[Mapping[str, Any]], thumbnails: Mapping[int, Any]) -> None:
    """Draws pictures with their best classes, the right one in green."""
    lines = [{"query": {"index": line["index"]}, "answers": [{"text": answer["class"], "score": answer["score"], "right": answer["label"] == line["label"]}
                                                             for answer in line["answers"]]} for line in predictions[:QUERIES]]
    image_to_text(path, lines, thumbnails)


def answered(path: str | os.PathLike, lines: Sequence[Mapping[str, Any]], thumbnails: Mapping[int, Any]) -> None:
    """Draws pictures with prompt, answer and target, right answers in green; `boxes` {"target", "answer"} of a line (shares: top, left, bottom, right) are
    drawn into its picture."""
    from matplotlib.patches import Rectangle
    rows = max(1, -(-len(lines) // 2))
    figure, axes = _grid(rows, 4, widths=[1, 3, 1, 3])
    for number, line in enumerate(lines):
        cells = axes[number % rows][2 * (number // rows):]
        thumbnail = np.asarray(thumbnails[line["index"]])
        _picture(cells[0], thumbnail, RIGHT if line["right"] else WRONG, 3 if line["right"] else 1)
        for which, boxes in line.get("boxes", {}).items():
            for top, left, bottom, right in boxes:
                height, width = thumbnail.shape[:2]
                cells[0].add_patch(Rectangle((left * width - 0.5, top * height - 0.5), (right - left) * width, (bottom - top) * height, fill=False,
                                             edgecolor=RIGHT if which == "target" else INK, linestyle="--" if which == "target" else "-", linewidth=1.5))
        words = [(line["prompt"], INK, "normal"), (line["prediction"] or "(nothing)", RIGHT if line["right"] else INK, "bold")]
        _words(cells[1], words[not line["prompt"]:] + [(line["references"][0], GREY, "normal")] * (not line["right"]))
    _save(figure, path)


def episodes(path: str | os.PathLike, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draws a row a question: the last of its `shots`, its `query` (each {"picture", "text"}), and the answer, green where it is right, else with the truth."""
    number = min(SHOTS, max((len(line["shots"]) for line in lines), default=0))
    figure, axes = _grid(2 * len(lines), number + 2, widths=[1.2] * (number + 1) + [2.2], heights=[1, 0.42] * len(lines))
    for row, line in enumerate(lines):
        shown = line["shots"][-number:] if number else []
        for column, panel in enumerate([*[None] * (number - len(shown)), *shown, line["query"]]):
            if panel is None:
                continue
            if panel["picture"] is not None:
                asked = column == number
                _picture(axes[2 * row][column], panel["picture"], (RIGHT if line["right"] else INK) if asked else WRONG, 3 if asked else 1)
            axes[2 * row + 1][column].text(0.5, 0.5, "\n".join(textwrap.wrap(panel["text"], 18)[:3]), color=INK, fontsize=7.5, ha="center", va="center",
                                           transform=axes[2 * row + 1][column].transAxes, parse_math=False)
        words = [(line["prediction"] or "(nothing)", RIGHT if line["right"] else INK, "bold")]
        _words(axes[2 * row][number + 1], words + [(line["references"][0], GREY, "normal")] * (not line["right"]))
    _save(figure, path)


def recall_curve(path: str | os.PathLike, ranks: Mapping[str, np.ndarray], answers: int) -> None:
    """Draws recall@k over k, one line a direction."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.2, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    limit = max(2, min(50, answers))
    k = np.arange(1, limit + 1)
    for direction, values in ranks.items():
        axes.plot(k, [(values <= place).mean() for place in k], label=direction.replace("_", " "), linewidth=2)
    axes.set(xscale="log", ylim=(0, 1.02), xlim=(1, limit), xlabel="k", ylabel="recall@k")
    axes.set_xticks([place for place in (1, 2, 5, 10, 20, 50) if place <= limit], [str(place) for place in (1, 2, 5, 10, 20, 50) if place <= limit])
    axes.minorticks_off()
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    storage.write_whole(path, content.getvalue())


def confusion(path: str | os.PathLike, labels: np.ndarray, answers: np.ndarray, names: Sequence[str], most: int = 12) -> None:
    """Draws the confusions of the classes that are most often wrong, at most `most` of them."""
    from matplotlib.figure import Figure
    wrong = np.bincount(labels[labels != answers], minlength=len(names)) + np.bincount(answers[labels != answers], minlength=len(names))
    present = [int(i) for i in np.argsort(-wrong, kind="stable") if wrong[i] or i in labels][:most]
    table = np.array([[np.sum((labels == a) & (answers == b)) for b in present] for a in present])
    figure = Figure(figsize=(6.4, 5.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.imshow(table / np.maximum(1, np.array([[np.sum(labels == a)] for a in present])), cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(table):
        if count:
            axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color="white" if count > 0.5 * max(1, np.sum(labels == present[i])) else INK)
    ticks = [names[i] for i in present]
    axes.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(ticks)), ticks, fontsize=8)
    axes.set(xlabel="answered", ylabel="shown", title="the classes most often confused")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    storage.write_whole(path, content.getvalue())


def _grid(rows: int, columns: int, widths: Sequence[float], heights: Sequence[float] | None = None):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(1.05 * sum(widths), 1.05 * (rows if heights is None else sum(heights))), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=widths, height_ratios=heights)
    for cell in axes.flat:
        cell.set_axis_off()
    return figure, axes


def _picture(cell, image, color: str, width: float) -> None:
    cell.imshow(np.asarray(image), interpolation="lanczos")
    cell.set_axis_on()
    cell.set(xticks=[], yticks=[])
    for spine in cell.spines.values():
        spine.set(color=color, linewidth=width)


def _words(cell, lines: Sequence[tuple[str, str, str]]) -> None:
    wrapped = [(piece, color, weight) for text, color, weight in lines for piece in (textwrap.wrap(text, 36) or [""])[:2]]
    step = min(0.2, 1.0 / max(1, len(wrapped)))
    for number, (piece, color, weight) in enumerate(wrapped):
        height = 0.5 + step * ((len(wrapped) - 1) / 2 - number)
        cell.text(0.02, height, piece, color=color, fontsize=8.5, fontweight=weight, va="center", transform=cell.transAxes, parse_math=False)


def _save(figure, path: str | os.PathLike) -> None:
    """Writes a PNG of 256 colours: a third of the size, and no eye sees the difference at these sizes."""
    from PIL import Image
    full, small = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")     # a script that the font does not have is drawn as boxes
        figure.savefig(full, facecolor="white")
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    storage.write_whole(path, small.getvalue())
