"""ground: find a control of a drawn user interface, asked and answered in the model's grounding format."""

from __future__ import annotations

from random import Random

from phisight.tasks.canvas import COLOURS, Canvas, Colour, Control, ink_on, paper, shade
from phisight.tasks.faces import FACES, text_width
from phisight.tasks.question import Box, Question
from phisight.tasks.read import WORDS
from phisight.tasks.scene import Scene

__all__ = ["DECIMALS", "box_answer", "ground_scene"]

DECIMALS = 2
"""Of a coordinate: the demo model has one token for each hundredth of a picture."""
PROMPT = (
    "Locate the UI element this instruction describes: {}. Output its bbox coordinates using the format of "
    "[x1, y1, x2, y2] using relative coordinates from 0.0000 to 1.0000."
)
SHORT_PROMPT = "Locate: {}."
INSTRUCTIONS = {
    "button": ("click {}", "click the {} button", "press {}", "press the {} button", "tap {}"),
    "field": ("type in the {} field", "click the {} field", "enter text in {}"),
    "checkbox": ("tick {}", "check {}", "toggle the {} checkbox"),
}
FONT_SIZES = (12, 15)
LEAST = 4
"""Controls of a picture."""


def ground_scene(rng: Random, size: tuple[int, int]) -> Scene:
    background = paper(rng)
    canvas = Canvas(size, background)
    controls = _draw(rng, canvas, background)
    questions: list[Question] = []
    for control in rng.sample(controls, min(len(controls), 4)):
        x0, y0, x1, y1 = control.box
        box = (x0 / canvas.width, y0 / canvas.height, x1 / canvas.width, y1 / canvas.height)
        prompt = SHORT_PROMPT if questions else PROMPT
        text = prompt.format(rng.choice(INSTRUCTIONS[control.kind]).format(control.word))
        questions.append(Question("ground", control.kind, text, control.word, box_answer(box), box))
    return Scene((canvas,), tuple(questions))


def box_answer(box: Box) -> str:
    return "[" + ", ".join(f"{value:.{DECIMALS}f}" for value in box) + "]"


def _draw(rng: Random, canvas: Canvas, background: Colour) -> list[Control]:
    columns = max(1, canvas.width // rng.randint(50, 76))
    rows = max(-(-LEAST // columns), canvas.height // rng.randint(22, 44))
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    count = min(rng.randint(LEAST, 8), len(cells))
    width, height = canvas.width // columns, canvas.height // rows
    face, colourful = rng.choice(FACES), rng.random() < 0.5
    words = [word for word in WORDS if text_width(word, face, FONT_SIZES[0]) + 6 <= width]
    return [
        _control(rng, canvas, word, (column * width, row * height, width, height), face, colourful, background)
        for (row, column), word in zip(rng.sample(cells, count), rng.sample(words, count), strict=True)
    ]


def _control(
    rng: Random,
    canvas: Canvas,
    word: str,
    cell: tuple[int, int, int, int],
    face: str,
    colourful: bool,
    background: Colour,
) -> Control:
    """Draw a control in a cell of x, y, width, height."""
    sizes = [size for size in range(FONT_SIZES[0], FONT_SIZES[1] + 1) if text_width(word, face, size) + 6 <= cell[2]]
    size = rng.choice([size for size in sizes if size + 4 <= cell[3]] or sizes[:1])
    inked = text_width(word, face, size)
    kind = rng.choices(("button", "field", "checkbox"), (0.6, 0.25, 0.15))[0]
    tick = size - 2
    if kind == "checkbox" and inked + tick + 8 > cell[2]:
        kind = "button"
    content = inked + (tick + 4 if kind == "checkbox" else 0)
    width = min(cell[2] - 2, content + (4 if kind == "checkbox" else rng.randint(6, 20)))
    height = min(cell[3] - 1, size + (2 if kind == "checkbox" else rng.randint(3, 11)))
    x = cell[0] + rng.randint(1, max(1, cell[2] - width - 1))
    y = cell[1] + rng.randint(0, max(0, cell[3] - height - 1))
    box = (x, y, x + width, y + height)
    baseline = y + round(height / 2 + size * 0.36)
    if kind == "checkbox":
        ink = ink_on(rng, background)
        top = y + (height - tick) // 2
        canvas.frame(x + 1, top, x + 1 + tick, top + tick, ink)
        if rng.random() < 0.5:
            canvas.rectangle(x + 4, top + 3, x + tick - 2, top + tick - 3, ink)
        canvas.text(word, x + tick + 5, baseline, face, size, ink)
    else:
        if kind == "field":
            fill = (250, 250, 250)
        else:
            fill = shade(rng, rng.choice(list(COLOURS))) if colourful else paper(rng)
        ink = ink_on(rng, fill)
        canvas.rectangle(*box, fill)
        canvas.frame(*box, ink_on(rng, background) if kind == "field" else ink)
        left = 3 if kind == "field" else (width - inked) // 2
        canvas.text(word, x + left, baseline, face, size, ink)
    control = Control(word, kind, box)
    canvas.marks.append(control)
    return control
