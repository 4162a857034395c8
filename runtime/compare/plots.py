"""Scatter plots as SVG for a page: each variant a labelled mark, and a line through those that none other beats.

Colours are the page's (CSS variables). Marks differ in shape too: a disc for ONNX, a square for GGUF, a diamond for a
checkpoint; they are hollow at the accuracy level that the model is not run at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

__all__ = [
    "BOTTOM",
    "HEIGHT",
    "LEFT",
    "RIGHT",
    "TOP",
    "WIDTH",
    "Axis",
    "Point",
    "Scale",
    "axes",
    "pareto_front",
    "scale_of",
    "scatter",
]

WIDTH, HEIGHT = 620, 380
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 20, 52
CHARACTER, LINE = 7.0, 14.0
"""Width and height of a label's characters, about."""
MOST_LABEL = 30


@dataclass(frozen=True)
class Point:
    """A variant: where it lies, and in `details` its figures for a tooltip. `ringed` gets a ring around its mark."""

    name: str
    x: float
    y: float
    format: str
    filled: bool
    details: str
    ringed: bool = False


@dataclass(frozen=True)
class Axis:
    """better: which way is better. log: in decades; values that are not positive then lie at the edge."""

    label: str
    better: Literal["less", "more"]
    log: bool = False
    show: Callable[[float], str] = "{:g}".format


@dataclass(frozen=True)
class Scale:
    """Values -> pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def at(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.log else value
        return self.start + (self.stop - self.start) * (place - low) / (high - low)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
            marks = [step * 10.0**decade for decade in range(first, last + 1) for step in steps]
        else:
            step = _nice((self.high - self.low) / 5)
            marks = [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [mark for mark in marks if self.low <= mark * 1.000001 and mark <= self.high * 1.000001]


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis) -> str:
    """One plot, or a line of text if nothing can be shown."""
    if not points:
        return "<p>Nothing to show.</p>"
    across = scale_of([point.x for point in points], LEFT, WIDTH - RIGHT, x.log)
    up = scale_of([point.y for point in points], HEIGHT - BOTTOM, TOP, y.log)
    front = pareto_front(points, x, y)
    said = "; ".join(f"{point.name}: {point.details}" for point in points)
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title><desc>{escape(said)}</desc>",
            *axes(across, up, x, y),
            _front(front, across, up),
            *(_ring(across.at(point.x), up.at(point.y)) for point in points if point.ringed),
            *(_mark(point, across.at(point.x), up.at(point.y)) for point in points),
            *_labels(points, across, up),
            "</svg>",
        ]
    )


def pareto_front(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """The points that no other one beats in one way and equals in the other, by x."""

    def costs(point: Point) -> tuple[float, float]:
        return point.x if x.better == "less" else -point.x, point.y if y.better == "less" else -point.y

    front = []
    for point in points:
        own = costs(point)
        others = [costs(other) for other in points]
        if not any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in others):
            front.append(point)
    return sorted(front, key=lambda point: (point.x, point.y))


def scale_of(values: Sequence[float], start: float, stop: float, log: bool) -> Scale:
    """With some room around the values."""
    if log:
        positive = [value for value in values if value > 0] or [1.0]
        low = min(positive) / (10 if len(positive) < len(values) else 2)
        return Scale(low, max(positive) * 2, start, stop, log)
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.12 * abs(high) or 1.0
    return Scale(max(low - room, 0.0) if low >= 0 else low - room, high + room, start, stop, log)


def _nice(step: float) -> float:
    """The next step up of 1, 2, 5, 10, ..."""
    decade = 10.0 ** math.floor(math.log10(step))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= step * 0.999)


def axes(across: Scale, up: Scale, x: Axis, y: Axis) -> list[str]:
    parts = [
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>'
    ]
    for tick in across.ticks():
        at = across.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{x.show(tick)}</text>'
        )
    for tick in up.ticks():
        at = up.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y.show(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
    )
    parts.append(
        f'<text class="axis" transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.label)}</text>"
    )
    return parts


def _front(front: Sequence[Point], across: Scale, up: Scale) -> str:
    places = " ".join(f"{across.at(point.x):.1f},{up.at(point.y):.1f}" for point in front)
    return f'<polyline class="front" points="{places}"/>'


def _mark(point: Point, x: float, y: float) -> str:
    kind = f'class="mark {escape(point.format)}{"" if point.filled else " hollow"}"'
    told = f"<title>{escape(point.name)}: {escape(point.details)}</title>"
    if point.format == "gguf":
        return f'<rect {kind} x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10">{told}</rect>'
    if point.format == "checkpoint":
        return f'<path {kind} d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z">{told}</path>'
    return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="5.5">{told}</circle>'


def _ring(x: float, y: float) -> str:
    return f'<ellipse class="ring" cx="{x:.1f}" cy="{y:.1f}" rx="10" ry="10"/>'


def _labels(points: Sequence[Point], across: Scale, up: Scale) -> list[str]:
    """Names beside their marks, where they cover no other name or mark."""
    marks = [(across.at(point.x), up.at(point.y)) for point in points]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in marks]
    parts = []
    for point, (x, y) in zip(points, marks, strict=True):
        name = point.name if len(point.name) <= MOST_LABEL else point.name[: MOST_LABEL - 1] + "\u2026"
        width = CHARACTER * len(name)
        for left, middle in _places(x, y, width):
            box = (left, middle - LINE / 2, left + width, middle + LINE / 2)
            inside = box[0] > LEFT and box[2] < WIDTH - RIGHT and box[1] > TOP and box[3] < HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                if abs(middle - y) > LINE:
                    parts.append(
                        f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{left + 2:.1f}" y2="{middle:.1f}"/>'
                    )
                parts.append(f'<text class="name" x="{left:.1f}" y="{middle + 4:.1f}">{escape(name)}</text>')
                break
    return parts


def _places(x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Left edge and middle of where a name may stand, the best first. A name without a place is in the tooltip."""
    beside = [(x + 13, y), (x - 13 - width, y), (x - width / 2, y - 16), (x - width / 2, y + 16)]
    farther = [
        (left, y + sign * LINE * lines)
        for lines in range(1, 9)
        for sign in (-1, 1)
        for left in (x + 14, x - 14 - width)
    ]
    return beside + farther


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
