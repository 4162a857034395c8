"""A question about pictures whose right answer is known, and what an answer to it is worth."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "Question", "Sample", "box_overlap", "centre_inside", "read_box"]

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as shares of the picture's width and height, 0 to 1."""


@dataclass(frozen=True)
class Question:
    """`thought` is what a model may write between <think> and </think>; only training looks at it."""

    task: str
    kind: str
    """The subtask, such as "price" of read."""
    text: str
    thought: str
    answer: str
    box: Box | None = None
    """The true box of a ground question, unrounded."""
    thinks: bool = False
    """Whether the answer is easier with a thought."""


@dataclass(frozen=True)
class Sample:
    """One question with the pictures that it is asked about: (height, width, 3) uint8 RGB each."""

    pictures: tuple[NDArray[np.uint8], ...]
    question: Question


_BOX = re.compile(r"\[\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*\]")


def read_box(answer: str) -> Box | None:
    """The first "[x1, y1, x2, y2]" in an answer, or None."""
    found = _BOX.search(answer)
    try:
        return (float(found[1]), float(found[2]), float(found[3]), float(found[4])) if found else None
    except ValueError:  # such as 0.1.2
        return None


def centre_inside(answer: Box, truth: Box) -> bool:
    """Whether the centre of the answer lies in the true box: a click there would hit."""
    x, y = (answer[0] + answer[2]) / 2, (answer[1] + answer[3]) / 2
    return truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]


def box_overlap(a: Box, b: Box) -> float:
    """Intersection over union, 0 for a box that is turned inside out."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union
