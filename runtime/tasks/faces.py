"""Typefaces: the coverage of single glyphs, from font files inside the package.

The files are cut to ASCII (fonts/LICENSES.md). Glyphs are drawn one by one at whole pixels, so that a picture does not
depend on a text layout engine, and the place of every glyph is known.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["CAP_HEIGHT", "FACES", "Glyph", "glyph", "size_of_capitals", "text_width"]

FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "Roboto-Regular", "OpenSans-Regular")
"""Four typefaces, one of them in two weights."""
CAP_HEIGHT = 0.72
"""Height of capitals in all of these faces as a share of the font's size, within 2 %."""

Glyph = tuple[NDArray[np.float32], int, int, int]
"""Coverage (height, width, 1) from 0 to 1, cut to its ink; ink's offset from the pen and the baseline; advance."""


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(__file__).parent / "fonts" / f"{face}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def glyph(character: str, face: str, size: int) -> Glyph:
    """A glyph in a font of `size` pixels. Its ink starts at the offsets (x, y) from pen and baseline (y down)."""
    font = _font(face, size)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character, anchor="ls"))
    image = Image.new("L", (max(right - left, 1) + 2, max(bottom - top, 1) + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), character, fill=255, font=font, anchor="ls")
    coverage = np.asarray(image, np.float32)[:, :, None] / np.float32(255)
    return coverage, left - 1, top - 1, round(font.getlength(character))


def size_of_capitals(height: float) -> int:
    """The font size whose capitals are `height` pixels high."""
    return round(height / CAP_HEIGHT)


def text_width(text: str, face: str, size: int, tracking: int = 0) -> int:
    """Pixels from the first pen position to the last advance."""
    return sum(glyph(character, face, size)[3] + tracking for character in text) - tracking
