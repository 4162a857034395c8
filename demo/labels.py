"""What is in every patch, for training the tower: which glyph, word, control, shape, colour, value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from phisight.tasks.canvas import COLOURS, Bar, Canvas, Control, Figure, Text
from phisight.tasks.count import SHAPES
from phisight.tasks.question import Box
from phisight.tasks.read import CODE_CHARACTERS, WORDS
from phisight.tasks.sizes import PATCH, Grid

__all__ = ["LABELS", "LABEL_OUTPUTS", "label_patches"]

GLYPHS = CODE_CHARACTERS + "$."
LABELS: dict[str, int] = {
    "glyph_left": 1 + len(GLYPHS),
    "glyph_right": 1 + len(GLYPHS),
    "place_left": 7,
    "place_right": 7,
    "line": 6,
    "word": 1 + len(WORDS),
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "value": 11,
}
"""Number of classes of each label; class 0 is "none here". Glyphs and their places in a text have two slots a patch."""
LABEL_OUTPUTS = sum(LABELS.values()) + 4
"""And four numbers: the box of the control that the patch belongs to."""
_INDEX = {name: index for index, name in enumerate(LABELS)}


def label_patches(canvas: Canvas, grid: Grid) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(patches, labels) int64 and the controls' boxes (patches, 4) float32 as shares of the picture, -1 where none."""
    rows, columns = grid
    labels = np.zeros((rows, columns, len(LABELS)), np.int64)
    boxes = np.full((rows, columns, 4), -1.0, np.float32)
    fy, fx = rows * PATCH / canvas.height, columns * PATCH / canvas.width

    def put(x: float, y: float, **values: int) -> None:
        row, column = (min(max(int(p) // PATCH, 0), n - 1) for p, n in ((y, rows), (x, columns)))
        for name, value in values.items():
            labels[row, column, _INDEX[name]] = value

    lines = 0
    for mark in canvas.marks:
        if isinstance(mark, Text):
            lines += 1
            _label_text(mark, min(lines, 5), fx, fy, put)
        elif isinstance(mark, Figure):
            x, y = _centre(mark.box)
            put(x * fx, y * fy, shape=SHAPES.index(mark.shape) + 1, colour=_colour(mark.colour))
        elif isinstance(mark, Bar):
            x = _centre(mark.box)[0] * fx
            for row in range(int(mark.box[1] * fy) // PATCH, int(mark.box[3] * fy - 1) // PATCH + 1):
                put(x, row * PATCH, colour=_colour(mark.colour), value=mark.value + 1)
        else:
            x0, y0, x1, y1 = mark.box
            box = (x0 / canvas.width, y0 / canvas.height, x1 / canvas.width, y1 / canvas.height)
            for row, column in _patches_inside(mark, fx, fy, grid):
                labels[row, column, _INDEX["word"]] = WORDS.index(mark.word) + 1
                boxes[row, column] = box
    return labels.reshape(-1, len(LABELS)), boxes.reshape(-1, 4)


def _label_text(text: Text, line: int, fx: float, fy: float, put: Callable[..., None]) -> None:
    for place, (character, box) in enumerate(zip(text.text, text.boxes, strict=True)):
        x, y = _centre(box)
        side = "left" if (x * fx) % PATCH < PATCH / 2 else "right"
        values = {f"glyph_{side}": GLYPHS.index(character) + 1, f"place_{side}": min(place + 1, 6), "line": line}
        put(x * fx, y * fy, **values)


def _colour(name: str) -> int:
    return list(COLOURS).index(name) + 1


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _patches_inside(control: Control, fx: float, fy: float, grid: Grid) -> Sequence[tuple[int, int]]:
    """Patches whose centre lies in a control's box, or at most 3 pixels outside."""
    x0, y0, x1, y1 = control.box[0] * fx - 3, control.box[1] * fy - 3, control.box[2] * fx + 3, control.box[3] * fy + 3
    half = PATCH / 2
    return [
        (row, column)
        for row in range(grid[0])
        for column in range(grid[1])
        if x0 <= column * PATCH + half <= x1 and y0 <= row * PATCH + half <= y1
    ]
