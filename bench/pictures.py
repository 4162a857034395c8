"""Pictures with questions for the built-in model, drawn from a seed."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_chart", "draw_price", "questions"]

COLOURS = {
    "red": (224, 32, 48),
    "green": (40, 160, 70),
    "blue": (40, 90, 210),
    "yellow": (244, 216, 48),
    "orange": (250, 136, 16),
    "purple": (148, 52, 180),
}


def draw_price(rng: np.random.Generator) -> Image.Image:
    """A price somewhere in a picture, in one light and one dark colour."""
    width, height = (int(16 * n) for n in rng.integers(5, 9, 2))
    dark, light = (tuple(int(c) for c in rng.integers(low, low + 80, 3)) for low in (0, 175))
    ground, ink = (dark, light) if rng.integers(2) else (light, dark)
    image = Image.new("RGB", (width, height), ground)
    text = f"${rng.integers(1, 10)}.{rng.integers(10, 100)}"
    font = ImageFont.load_default(size=int(rng.integers(13, 19)))
    place = (int(rng.integers(2, max(3, width - 60))), int(rng.integers(2, height - 22)))
    ImageDraw.Draw(image).text(place, text, fill=ink, font=font)
    return image


def draw_chart(rng: np.random.Generator) -> tuple[Image.Image, str, int]:
    """A chart of three or four bars of 1 to 9 with a line for each value -> picture, a colour in it, its value."""
    image = Image.new("RGB", (128, 96), (248, 248, 248))
    draw = ImageDraw.Draw(image)
    base, step = 86, 9
    for value in range(10):
        draw.line((4, base - value * step, 126, base - value * step), fill=(216, 216, 216))
    names = list(rng.permutation(list(COLOURS)))[: int(rng.integers(3, 5))]
    values = [int(value) for value in rng.integers(1, 10, len(names))]
    slot = 120 // len(names)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        left = 8 + i * slot + int(rng.integers(0, 6))
        draw.rectangle((left, base - value * step, left + int(rng.integers(9, 16)), base), fill=COLOURS[name])
    draw.line((3, 4, 3, base), fill=(112, 112, 112))
    draw.line((3, base, 126, base), fill=(112, 112, 112), width=2)
    asked = int(rng.integers(len(names)))
    return image, names[asked], values[asked]


def questions(count: int, seed: int = 0) -> list[tuple[Image.Image, str, str | None]]:
    """Picture, question, and the right answer where it is known: half prices, half charts."""
    rng = np.random.default_rng(seed)
    asked: list[tuple[Image.Image, str, str | None]] = []
    for number in range(count):
        if number % 2:
            image, colour, value = draw_chart(rng)
            asked.append((image, f"What is the value of the {colour} bar?", str(value)))
        else:
            asked.append((draw_price(rng), "What does the text say?", None))
    return asked
