"""Curves as one SVG that needs nothing else: shares of right answers against image tokens, a line for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from phisight.compare.plots import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, axes, scale_of

__all__ = ["curves"]

COLOURS = ("#1668b8", "#b4480f", "#4b7a1f", "#7a3fb0", "#b3261e", "#0f7b7b", "#8a6d00", "#555555")
DASHES = ("none", "6 3", "2 3", "8 3 2 3")
"""Lines differ in their dashes too, for those who see no difference of colours."""
KEY_WIDTH = 120
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.frame{fill:none;stroke:#888}.grid{stroke:#ddd}"
    "path{fill:none;stroke-width:2}"
)


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x: Axis, y: Axis) -> str:
    """`lines` are points by x, by name. Raises ValueError if there are none."""
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("there are no points to draw")
    across = scale_of([point[0] for point in points], LEFT, WIDTH - RIGHT, x.log)
    up = scale_of([point[1] for point in points], HEIGHT - BOTTOM, TOP, y.log)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + KEY_WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH + KEY_WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *axes(across, up, x, y),
    ]
    for number, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        places = [(across.at(point[0]), up.at(point[1])) for point in sorted(line)]
        drawn = " L".join(f"{left:.1f} {top:.1f}" for left, top in places)
        parts.append(f'<path d="M{drawn}" stroke="{colour}" stroke-dasharray="{dash}"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.5" fill="{colour}"/>' for left, top in places]
        row = TOP + 14 + 18 * number
        parts.append(f'<path d="M{WIDTH - 8} {row - 4}h20" stroke="{colour}" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{WIDTH + 18}" y="{row}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
