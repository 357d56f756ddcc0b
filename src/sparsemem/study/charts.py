"""Charts as SVG in a page: lines, points and cells, with a title per mark to hover over.

They are told apart by shape and dash as well as by colour, and take their colours from the page, so that
they are right in the dark too. Whoever cannot see them reads the table that stands beside each.
"""

import dataclasses
import math
from collections.abc import Sequence

from sparsemem.study.document import escaped

STYLE = """
.c0 { --c: #0072b2 } .c1 { --c: #c24f00 } .c2 { --c: #008060 } .c3 { --c: #b0508a } .c4 { --c: #a06c00 }
.c5 { --c: #2a7fb5 }
@media screen and (prefers-color-scheme: dark) {
  .c0 { --c: #5ab4e8 } .c1 { --c: #f08a4b } .c2 { --c: #3cc79a } .c3 { --c: #e39ac4 } .c4 { --c: #e9b640 }
  .c5 { --c: #9ad4f5 }
}
figure { margin: 1rem 0; }
svg { display: block; max-width: 100%; height: auto; color: var(--ink); font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; }
.axis { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 2; }
.point { fill: var(--c); stroke: var(--paper); stroke-width: 1; }
.cell { fill: rgb(var(--mark)); }
.cell:hover, .point:hover { stroke: currentColor; stroke-width: 2; }
.legend { list-style: none; padding: 0; margin: .3rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.legend svg { display: inline-block; vertical-align: middle; margin-right: .4rem; }
"""

NUM_COLOURS = 6
DASHES = ("", "7 4", "2 3", "9 3 2 3")
SHAPES = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6L6 5H-6z", "M0-6L6 0 0 6-6 0z")
WIDTH, HEIGHT = 420, 270
ROW, COLUMN = 13, 7
LEFT, RIGHT, TOP, BOTTOM = 60, 22, 12, 44


@dataclasses.dataclass(frozen=True)
class Series:
    """What is drawn in one colour and shape.

    Args:
        name: What it is.
        points: Across and up; a gap where up is None.
        line: What joins the points; no line if empty, the points themselves if None.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    line: Sequence[tuple[float, float | None]] | None = None


@dataclasses.dataclass(frozen=True)
class Axis:
    """What one direction means.

    Args:
        title: What it measures.
        low: Where it begins, if the values do not decide that.
        high: Where it ends.
        whole: Counts in whole numbers rather than percent.
    """

    title: str
    low: float | None = None
    high: float | None = None
    whole: bool = False

    def form(self, value: float) -> str:
        """Write a value, as its ticks do."""
        return (
            f"{value:.0f}" if self.whole else f"{value:.4g}" if abs(value) >= 100 else f"{100 * value:.3g} %"
        )

    def scale(self, values: Sequence[float]) -> "_Scale":
        """Choose round ticks around some values."""
        low = min(values) if self.low is None else self.low
        high = max(values) if self.high is None else self.high
        if high <= low:
            low, high = (low - 0.5, high + 0.5) if self.whole else (low - 0.01, high + 0.01)
        rough = (high - low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        step = max(1, step) if self.whole else step
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return _Scale(first * step, last * step, [number * step for number in range(first, last + 1)])


@dataclasses.dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    ticks: list[float]

    def place(self, value: float, start: float, end: float) -> float:
        return start + (end - start) * (value - self.low) / (self.high - self.low)


def chart(title: str, across: Axis, up: Axis, series: Sequence[Series]) -> str:
    """Draw series of points, joined by lines.

    Args:
        title: What it shows.
        across: Axis to the right.
        up: Axis upwards.
        series: What is drawn; with at least one point.

    Returns:
        A figure: the picture and its legend.
    """
    shown = [(x, y) for one in series for x, y in (*one.points, *(one.line or ())) if y is not None]
    scale_x, scale_y = across.scale([x for x, _ in shown]), up.scale([y for _, y in shown])

    def place(x: float, y: float) -> tuple[str, str]:
        right, low = WIDTH - RIGHT, HEIGHT - BOTTOM
        return f"{scale_x.place(x, LEFT, right):.1f}", f"{scale_y.place(y, low, TOP):.1f}"

    marks = []
    for number, one in enumerate(series):
        colour, dash, shape = _look(number)
        for piece in _pieces(one.points if one.line is None else one.line):
            path = "L".join(" ".join(place(x, y)) for x, y in piece)
            marks.append(f'<path class="line {colour}" stroke-dasharray="{dash}" d="M{path}"/>')
        for x, y in one.points:
            if y is not None:
                label = f"{one.name}: {up.form(y)} at {across.title} {across.form(x)}"
                where = f"translate({' '.join(place(x, y))})"
                marks.append(
                    f'<path class="point {colour}" transform="{where}" d="{shape}">'
                    f"<title>{escaped(label)}</title></path>"
                )
    desc = f"{up.title} by {across.title}: {', '.join(one.name for one in series)}. A table follows."
    body = _grid(across, up, scale_x, scale_y) + "".join(marks)
    return (
        f"<figure>{picture(title, desc, WIDTH, HEIGHT, body)}\n"
        f"<figcaption>{escaped(title)}{_legend(series)}</figcaption></figure>"
    )


def picture(title: str, desc: str, width: float, height: float, body: str) -> str:
    """Wrap marks as a picture that has a name and a description for those who cannot see it."""
    return (
        f'<svg role="img" aria-label="{escaped(f"{title}. {desc}")}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}"><desc>{escaped(desc)}</desc>{body}</svg>'
    )


def cells(
    title: str, desc: str, rows: Sequence[str], columns: int, marks: Sequence[tuple[int, int, float, str]]
) -> str:
    """Draw a heatmap.

    Args:
        title: What it shows.
        desc: The same in a sentence or two.
        rows: Name of each row.
        columns: How many there are.
        marks: Row, column, strength from 0 to 1, and what to say when hovered over.
    """
    left = 8 + 7.5 * max(map(len, rows), default=0)
    height, width = ROW * len(rows) + 4, left + COLUMN * columns + 4
    parts = [
        f'<text x="{left - 6:g}" y="{ROW * row + ROW - 2}" text-anchor="end">{escaped(name)}</text>'
        f'<path class="axis" d="M{left:g} {ROW * (row + 1)}H{width:g}"/>'
        for row, name in enumerate(rows)
    ]
    parts += [
        f'<rect class="cell" x="{left + COLUMN * column:g}" y="{ROW * row + 1}" width="{COLUMN - 1}" '
        f'height="{ROW - 2}" fill-opacity="{0.25 + 0.75 * strength:.2f}">'
        f"<title>{escaped(label)}</title></rect>"
        for row, column, strength, label in marks
    ]
    drawn = picture(title, desc, width, height, "".join(parts))
    # At its own size: cells that shrink with the screen could not be pointed at.
    return drawn.replace("<svg ", '<svg style="max-width: none" ', 1)


def _look(number: int) -> tuple[str, str, str]:
    return f"c{number % NUM_COLOURS}", DASHES[number % len(DASHES)], SHAPES[number % len(SHAPES)]


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Cut a line where a value is missing; a single point is no line."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if len(piece) > 1]


def _grid(across: Axis, up: Axis, scale_x: _Scale, scale_y: _Scale) -> str:
    right, low, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = []
    for tick in scale_y.ticks:
        y = scale_y.place(tick, low, TOP)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{up.form(tick)}</text>')
    for tick in scale_x.ticks:
        x = scale_x.place(tick, LEFT, right)
        parts.append(f'<text x="{x:.1f}" y="{low + 16}" text-anchor="middle">{across.form(tick)}</text>')
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escaped(across.title)}</text>'
        f'<text transform="translate(10 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escaped(up.title)}</text>"
    )
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    items = []
    for number, one in enumerate(series):
        colour, dash, shape = _look(number)
        items.append(
            '<li><svg aria-hidden="true" width="30" height="14" viewBox="-15 -7 30 14">'
            f'<path class="line {colour}" stroke-dasharray="{dash}" d="M-15 0H15"/>'
            f'<path class="point {colour}" d="{shape}"/></svg>{escaped(one.name)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'
