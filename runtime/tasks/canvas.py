"""What the tasks draw on: pixels, and beside them a list of what was drawn where."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from phisight.tasks.faces import glyph
from phisight.tasks.question import Box

__all__ = ["COLOURS", "Bar", "Canvas", "Colour", "Control", "Figure", "Text", "grey_paper", "ink_on", "paper", "shade"]

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 220),
    "yellow": (235, 205, 40),
    "orange": (245, 135, 25),
    "purple": (140, 55, 170),
    "pink": (245, 130, 185),
}


@dataclass(frozen=True)
class Text:
    text: str
    boxes: tuple[Box, ...]
    """One for each glyph, in pixels, from the ascender to the descender."""


@dataclass(frozen=True)
class Control:
    word: str
    kind: str
    box: Box


@dataclass(frozen=True)
class Figure:
    shape: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Bar:
    colour: str
    value: int
    box: Box


class Canvas:
    """Pixels (height, width, 3) uint8, and `marks`: everything drawn that a question may be about, boxes in pixels."""

    def __init__(self, size: tuple[int, int], background: Colour) -> None:
        self.height, self.width = size
        self.pixels: NDArray[np.uint8] = np.empty((*size, 3), np.uint8)
        self.pixels[:] = background
        self.marks: list[Text | Control | Figure | Bar] = []

    def rectangle(self, x0: int, y0: int, x1: int, y1: int, fill: Colour) -> None:
        self.pixels[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = fill

    def frame(self, x0: int, y0: int, x1: int, y1: int, colour: Colour) -> None:
        for side in ((x0, y0, x1, y0 + 1), (x0, y1 - 1, x1, y1), (x0, y0, x0 + 1, y1), (x1 - 1, y0, x1, y1)):
            self.rectangle(*side, colour)

    def text(self, text: str, x: int, baseline: int, face: str, size: int, colour: Colour, tracking: int = 0) -> Text:
        """Draw from the pen position x; returns the text with its glyphs' boxes, which is not yet a mark."""
        boxes = []
        for character in text:
            coverage, left, top, advance = glyph(character, face, size)
            self._blend(coverage, x + left, baseline + top, colour)
            boxes.append((x, baseline - 0.76 * size, x + advance, baseline + 0.04 * size))
            x += advance + tracking
        return Text(text, tuple(boxes))

    def shape(self, shape: str, colour: Colour, name: str, x: float, y: float, size: float) -> None:
        """A circle, square or triangle around a centre; `size` is its height in pixels."""
        image = Image.fromarray(self.pixels)
        draw, r = ImageDraw.Draw(image), size / 2
        if shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif shape == "square":
            draw.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=colour)
        else:
            draw.polygon(((x, y - r), (x + r, y + r * 0.85), (x - r, y + r * 0.85)), fill=colour)
        self.pixels = np.array(image)
        self.marks.append(Figure(shape, name, (x - r, y - r, x + r, y + r)))

    def _blend(self, coverage: NDArray[np.float32], x: int, y: int, colour: Colour) -> None:
        height, width = coverage.shape[:2]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, self.width), min(y + height, self.height)
        if x1 > x0 and y1 > y0:
            part = coverage[y0 - y : y1 - y, x0 - x : x1 - x]
            under = self.pixels[y0:y1, x0:x1].astype(np.float32)
            self.pixels[y0:y1, x0:x1] = under + part * (np.asarray(colour, np.float32) - under)


def _luminance(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def ink_on(rng: Random, background: Colour) -> Colour:
    """Any colour that can be read on the background."""
    while True:
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if abs(_luminance(colour) - _luminance(background)) > 95:
            return colour


def paper(rng: Random) -> Colour:
    """A background: light or dark, tinted."""
    low, high = (195, 255) if rng.random() < 0.5 else (0, 80)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def grey_paper(rng: Random) -> Colour:
    """A background on which all named colours stand out."""
    value = rng.randint(225, 255) if rng.random() < 0.6 else rng.randint(15, 50)
    return value, value, value


def shade(rng: Random, name: str) -> Colour:
    """A named colour, never twice exactly the same."""
    red, green, blue = (min(255, max(0, value + rng.randint(-14, 14))) for value in COLOURS[name])
    return red, green, blue
