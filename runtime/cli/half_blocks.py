"""A picture as text: a cell of a terminal is about twice as high as wide, and a half block makes two pixels of it.

pixels (height, width, 3) -> shrunk (rows of halves, columns, 3) -> one line of text for each two rows
"""

from __future__ import annotations

from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["BLOCKS", "Colours", "half_blocks", "side_by_side"]

Colours: TypeAlias = Literal["true", "256", "mono"]
"""What a terminal can show: 24-bit colours, xterm's palette of 256, or two brightnesses."""

UPPER, LOWER, FULL = BLOCKS = "▀▄█"
RESET = "\x1b[0m"

LEVELS = (0, 95, 135, 175, 215, 255)
PALETTE = np.array(
    [[r, g, b] for r in LEVELS for g in LEVELS for b in LEVELS] + [[10 * n + 8] * 3 for n in range(24)], np.int32
)
"""(240, 3): xterm's colour cube, then its greys. The 16 colours before them are the user's own, and unknown."""
FIRST_OF_PALETTE = 16

Half: TypeAlias = tuple[int, ...] | None
"""The colour of half a cell: r, g, b, or a number of the palette; None where the picture has ended."""


def half_blocks(picture: NDArray[np.uint8], columns: int, rows: int, colours: Colours = "true") -> list[str]:
    """Lines of equal width that show a picture (height, width, 3), at most `columns` wide and `rows` high.

    The shape is kept, and a small picture is not enlarged. A line leaves the terminal's colours as they were.
    """
    shrunk = _shrink(picture, columns, 2 * rows)
    if colours == "mono":
        return _monochrome(shrunk)
    halves = _in_palette(shrunk) if colours == "256" else shrunk
    lines = [[tuple(map(int, half)) for half in line] for line in halves]
    ends: list[Half] = [None] * shrunk.shape[1]
    return [
        _coloured(upper, lines[2 * row + 1] if 2 * row + 1 < len(lines) else ends)
        for row, upper in enumerate(lines[::2])
    ]


def side_by_side(left: list[str], right: list[str], gap: int) -> list[str]:
    """Two pictures of the same height as one."""
    return [f"{a}{' ' * gap}{b}" for a, b in zip(left, right, strict=True)]


def _shrink(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The mean of the pixels under each half cell, in the picture's shape: (halves, columns, 3)."""
    share = min(width / picture.shape[1], height / picture.shape[0], 1.0)
    size = (max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _in_palette(pixels: NDArray[np.uint8]) -> NDArray[np.intp]:
    """The nearest of the palette's colours: (halves, columns, 3) -> (halves, columns, 1)."""
    distances = np.square(pixels[:, :, None].astype(np.int32) - PALETTE).sum(axis=-1)
    numbers: NDArray[np.intp] = distances.argmin(axis=-1, keepdims=True)
    return FIRST_OF_PALETTE + numbers


def _monochrome(pixels: NDArray[np.uint8]) -> list[str]:
    """A block where the picture is brighter than on the average: most of a drawing is its plain background."""
    brightness = pixels @ np.array([299, 587, 114])
    bright = brightness > brightness.mean()
    if len(bright) % 2:
        bright = np.vstack([bright, np.zeros_like(bright[:1])])
    cells = bright[::2] + 2 * bright[1::2]  # (rows, columns)
    return ["".join(f" {BLOCKS}"[cell] for cell in line) for line in cells]


def _coloured(upper: list[tuple[int, ...]], lower: list[Half] | list[tuple[int, ...]]) -> str:
    """One line; a colour is said once for all cells that have it in a row."""
    runs = groupby(zip(upper, lower, strict=True))
    cells = [_sequence(above, below) + UPPER * len(list(run)) for (above, below), run in runs]
    return "".join(cells) + RESET


def _sequence(upper: tuple[int, ...], lower: Half) -> str:
    """ECMA-48's SGR: the block is the upper half, and the background behind it the lower one (49: the terminal's)."""
    background = "49" if lower is None else f"48;{_colour(lower)}"
    return f"\x1b[38;{_colour(upper)};{background}m"


def _colour(half: tuple[int, ...]) -> str:
    return f"{2 if len(half) == 3 else 5};{';'.join(map(str, half))}"
