"""Pieces of a report: escaped text, numbers as people write them, tables, folded parts and curves as inline SVG."""
from collections.abc import Callable, Iterable, Mapping, Sequence
import html
import json
import math
import re
from typing import Any

# Folders of a machine say nothing to a reader elsewhere and may hold names of people: only the last part stays. gs://... is not one of them.
_LOCAL_PATH = re.compile(r"(?<![\w.:/*\])}])(?:/|[A-Za-z]:\\)(?:[^\s/\\\"'<>|]+[/\\])+([^\s/\\\"'<>|]*)")
_SHARES = re.compile(r"(^|/)(r@\d+|top\d+|mean_per_class|accuracy|mfu|data_wait)(/|$)")

Points = Sequence[tuple[float, float]]


def escape(value: Any) -> str:
    """Returns a value as HTML text, fit for attributes too; absolute local paths are cut to their last part."""
    return html.escape(without_paths(str(value)), quote=True)


def without_paths(text: str) -> str:
    """Returns `text` with absolute local paths cut to `.../NAME`."""
    return _LOCAL_PATH.sub(lambda found: f".../{found.group(1)}", text)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (and not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_share(name: str) -> bool:
    """Whether a metric of this name is a fraction of 1, shown as a percentage."""
    return bool(_SHARES.search(name))


def number(value: Any, name: str = "") -> str:
    """Returns a value for people: `48.3 %` (never broken in two), `1,529,858`, `2.918`, `3.9e-08`, or a dash where there is none."""
    if not is_number(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    if is_share(name):
        return f"{100 * value:.1f}\u00a0%"
    if value == 0 or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 0.001:
        return f"{value:.4g}"
    return f"{value:.1e}"


def plural(count: int, noun: str) -> str:
    """`1 step`, `300 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def words(name: str) -> str:
    """Returns a name of the code as words: `text_to_image` is `text to image`."""
    return name.replace("_", " ")


def compact_json(value: Any, width: int = 110, indent: str = "") -> str:
    """Returns JSON in which what fits on a line is on one."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(line) <= width or not isinstance(value, (dict, list)) or not value:
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {compact_json(item, width, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + compact_json(item, width, inner) for item in value) + f"\n{indent}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True, above: str = "") -> str:
    """Returns a table that scrolls sideways where it has to.

    Args:
      head: names of the columns, as HTML; empty for no head.
      rows: cells as HTML; one that begins with `<td` is taken as it is. The first of a row is its head.
      numbers: whether the columns after the first hold numbers, set to the right.
      above: a row of the head above the others, as HTML.
    """
    side = ' class="number"' if numbers else ""
    top = "".join(f"<th scope=\"col\"{side if i else ''}>{cell}</th>" for i, cell in enumerate(head))
    body = []
    for row in rows:
        cells = [cell if cell.startswith("<td") else f"<td{side}>{cell}</td>" for cell in row[1:]]
        body.append(f'<tr><th scope="row">{row[0]}</th>{"".join(cells)}</tr>')
    thead = f"<thead>{above}<tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{thead}<tbody>{"".join(body)}</tbody></table></div>'


def bar_cell(value: Any, name: str) -> str:
    """Returns a cell that shows a fraction as a bar; empty for what is not a fraction."""
    if not is_share(name) or not is_number(value):
        return '<td class="bar"></td>'
    return f'<td class="bar"><span><b style="width:{100 * min(1.0, max(0.0, value)):.1f}%"></b></span></td>'


def folded(title: str, remark: str, content: str) -> str:
    """Returns a part that opens on a click."""
    return f"<details><summary>{title}<span>{remark}</span></summary><div>{content}</div></details>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers that span low..high: multiples of 1, 2 or 5 times a power of ten, about `count` of them."""
    if not high > low:
        high = low + (abs(low) * 0.1 or 1.0)
        low -= high - low
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [round(i * unit, 12 - math.floor(math.log10(unit))) for i in range(first, last + 1)]


def smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """Returns the running average over about `share` of the points, without the lag towards the first value."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        result.append((x, total / weight))
    return result


def line_chart(title: str, series: Mapping[str, Points], stages: Sequence[int] = (), smoothed: bool = False,
               called: Callable[[str], str] = words) -> str:
    """Returns a figure of curves over steps as inline SVG, or "" where no curve has two finite points.

    Args:
      title: the quantity.
      series: {name: [(step, value), ...]}; up to six.
      stages: steps at which a stage of training begins, drawn as dotted lines.
      smoothed: draws the points of one curve faintly and their running average above.
      called: from the name of a curve to the words of its key.
    """
    series = {name: [(x, y) for x, y in points if is_number(x) and is_number(y)] for name, points in list(series.items())[:6]}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return ""
    xs, ys = zip(*(point for points in series.values() for point in points))
    share = all(is_share(name) for name in series)
    vertical = ticks(*((0.0, max(0.01, *ys)) if share else (min(ys), max(ys))))
    begin, across = min(0, *xs), max(xs) - min(0, *xs) or 1
    left, right, top, bottom, width, height = 54, 462, 14, 218, 480, 248

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - begin) / across * (right - left), bottom - (y - vertical[0]) / (vertical[-1] - vertical[0]) * (bottom - top)

    parts = []
    for value in vertical:
        y = place(begin, value)[1]
        label = f"{100 * value:g} %" if share else _tick(value, vertical)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in _whole_ticks(begin, max(xs)):
        parts.append(f'<text x="{place(value, 0)[0]:.1f}" y="{bottom + 21}" text-anchor="middle">{_thousands(value)}</text>')
    for step in stages:
        if begin < step < max(xs):
            x = place(step, 0)[0]
            parts.append(f'<line class="stage" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}">'
                         f'<title>a stage begins after step {step:,}</title></line>')
    for i, (name, points) in enumerate(series.items()):
        drawn = points
        if smoothed and len(points) > 60:
            parts.append(f'<path class="curve faint s{i}" d="{_path(points, place)}"/>')
            drawn = smooth(points)
        parts.append(f'<path class="curve s{i}" d="{_path(drawn, place)}"/>')
        for x, y in (points if len(points) <= 12 and not smoothed else points[-1:] if not smoothed else drawn[-1:]):
            cx, cy = place(x, y)
            parts.append(f'<circle class="dot s{i}" cx="{cx:.1f}" cy="{cy:.1f}" r="4"><title>step {x:,}: {escape(number(y, name))}</title></circle>')
    keys = "".join(f'<span class="key"><i class="s{i}"></i>{escape(called(name))}</span>' for i, name in enumerate(series)) if len(series) > 1 else ""
    last = ", ".join(f"{called(name)} {number(points[-1][1], name)}" for name, points in series.items())
    return (f'<figure class="chart"><figcaption>{escape(title)}{keys}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)} over steps; at the end: {escape(last)}">{"".join(parts)}</svg></figure>')


def _path(points: Points, place) -> str:
    every = max(1, len(points) // 1000)     # a screen has no more columns
    kept = [*points[:-1:every], points[-1]]
    return "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in kept))


def _tick(value: float, among: Sequence[float]) -> str:
    if value == 0:
        return "0"
    size = max(abs(among[0]), abs(among[-1]))
    if size < 0.01 or size >= 1e6:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}" if size < 1000 else f"{value:,.0f}"


def _whole_ticks(low: float, high: float) -> list[float]:
    return [value for value in ticks(low, high, 5) if low <= value <= high and float(value).is_integer()]


def _thousands(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"
