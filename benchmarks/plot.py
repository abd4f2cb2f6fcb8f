"""Line plots with two logarithmic axes as SVG text, so that documentation needs no plotting library."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Callable, List, NamedTuple, Sequence, Tuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 170, 44, 56  # margins
COLORS = ("#1f6fb2", "#d1495b", "#2e8b57", "#8a5fbf")

Point = Tuple[float, float]


class Series(NamedTuple):
    """A named line through points; `floor` lines are grey and dashed."""

    name: str
    points: Sequence[Point]
    floor: bool = False


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high` over the pixels from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.begin + part * (self.end - self.begin)

    def ticks(self, base: int) -> List[float]:
        """List powers of `base` on the axis, every second, third... where they would be more than twelve."""
        first, last = math.ceil(_log(self.low, base)), math.floor(_log(self.high, base))
        return [float(base) ** power for power in range(first, last + 1, 1 + (last - first) // 12)]


def render(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> str:
    """Return the SVG of `series`, whose coordinates are positive."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_axis = Axis(min(xs), max(max(xs), 2 * min(xs)), LEFT, WIDTH - RIGHT)
    # Whole decades, so that slopes can be read.
    low, high = 10.0 ** math.floor(_log(min(ys), 10)), 10.0 ** math.ceil(_log(max(ys), 10))
    y_axis = Axis(low, max(high, 10 * low), HEIGHT - BOTTOM, TOP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _label((LEFT + WIDTH - RIGHT) / 2, 24, title, size=16),
        *_grid(x_axis, y_axis),
        _label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label),
        f'<g transform="rotate(-90 20 {HEIGHT / 2})">{_label(20, HEIGHT / 2, y_label)}</g>',
    ]
    colors = itertools.cycle(COLORS)
    for number, one in enumerate(series):
        color = "#777777" if one.floor else next(colors)
        lines += _drawn(one, color, x_axis.place, y_axis.place)
        lines += _legend(one, color, TOP + 22 * number)
    return "\n".join([*lines, "</svg>", ""])


def _log(value: float, base: int) -> float:
    return round(math.log(value, base), 9)  # so that a power of the base is whole


def _grid(x_axis: Axis, y_axis: Axis) -> List[str]:
    lines: List[str] = []
    for value in x_axis.ticks(2):
        x = x_axis.place(value)
        lines.append(_line((x, y_axis.begin), (x, y_axis.end), "#e3e3e3"))
        lines.append(_label(x, HEIGHT - BOTTOM + 18, f"{value:,.0f}", size=11))
    for value in y_axis.ticks(10):
        y = y_axis.place(value)
        lines.append(_line((x_axis.begin, y), (x_axis.end, y), "#e3e3e3"))
        lines.append(_label(LEFT - 8, y + 4, f"{value:,g}", size=11, anchor="end"))
    return lines


def _drawn(one: Series, color: str, x: Callable[[float], float], y: Callable[[float], float]) -> List[str]:
    path = " ".join(f"{x(point[0]):.1f},{y(point[1]):.1f}" for point in one.points)
    dash = ' stroke-dasharray="6 4"' if one.floor else ""
    lines = [f'<polyline stroke="{color}" points="{path}" fill="none" stroke-width="2"{dash}/>']
    for point in () if one.floor else one.points:
        hint = f"<title>{escape(one.name)}: {point[0]:,.0f}: {point[1]:,.1f}</title>"
        lines.append(f'<circle fill="{color}" cx="{x(point[0]):.1f}" cy="{y(point[1]):.1f}" r="3.5">{hint}</circle>')
    return lines


def _legend(one: Series, color: str, y: float) -> List[str]:
    begin = WIDTH - RIGHT + 14
    dash = ' stroke-dasharray="6 4"' if one.floor else ""
    return [
        f'<line x1="{begin}" y1="{y}" x2="{begin + 26}" y2="{y}" stroke="{color}" stroke-width="2"{dash}/>',
        _label(begin + 32, y + 4, one.name, size=12, anchor="start"),
    ]


def _line(begin: Point, end: Point, color: str) -> str:
    return f'<line x1="{begin[0]:.1f}" y1="{begin[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{color}"/>'


def _label(x: float, y: float, text: str, *, size: int = 13, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'
