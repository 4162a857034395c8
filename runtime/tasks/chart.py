"""chart: 2 to 5 coloured bars of whole values from 0 to 9, with a line at every value."""

from __future__ import annotations

from random import Random

from phisight.tasks.canvas import COLOURS, Bar, Canvas, grey_paper, shade
from phisight.tasks.question import Question
from phisight.tasks.scene import Scene

__all__ = ["MIN_HEIGHT", "chart_scene"]

MIN_HEIGHT = 74
"""Pixels that ten lines a good 6 pixels apart need."""
HIGHEST = 9
FOOT = 6
"""Height of the coloured foot below the axis, which shows a bar of value 0."""
ASK_VALUE = (
    "What is the value of the {} bar?",
    "How tall is the {} bar?",
    "How high is the {} bar?",
    "Which value does the {} bar have?",
)
ASK_SUM = ("What is the sum of the {} and {} bars?", "Add the values of the {} and {} bars.")
ASK_DIFFERENCE = ("What is the difference between the {} and {} bars?", "How far apart are the {} and {} bars?")


def chart_scene(rng: Random, size: tuple[int, int]) -> Scene:
    background = grey_paper(rng)
    canvas = Canvas(size, background)
    values = _draw(rng, canvas, background[0])
    names = list(values)
    listing = ", ".join(f"{name} {value}" for name, value in values.items())
    questions = []
    for name in rng.sample(names, min(len(names), 2)):
        text = rng.choice(ASK_VALUE).format(name)
        questions.append(Question("chart", "value", text, f"{name} {values[name]}", str(values[name])))
    ordered = sorted(values.values())
    for extreme, unique, words in (
        (ordered[-1], ordered[-1] > ordered[-2], ("tallest", "largest", "highest")),
        (ordered[0], ordered[0] < ordered[1], ("shortest", "smallest", "lowest")),
    ):
        if unique:
            name = next(name for name in names if values[name] == extreme)
            questions.append(Question("chart", "extreme", f"Which bar is the {rng.choice(words)}?", listing, name))
    a, b = rng.sample(names, 2)
    total = values[a] + values[b]
    thought = f"{a} {values[a]}, {b} {values[b]}, {values[a]}+{values[b]}={total}"
    questions.append(Question("chart", "sum", rng.choice(ASK_SUM).format(a, b), thought, str(total), thinks=True))
    a, b = rng.sample(names, 2)
    high, low = max(values[a], values[b]), min(values[a], values[b])
    thought = f"{a} {values[a]}, {b} {values[b]}, {high}-{low}={high - low}"
    text = rng.choice(ASK_DIFFERENCE).format(a, b)
    questions.append(Question("chart", "difference", text, thought, str(high - low), thinks=True))
    rng.shuffle(questions)
    return Scene((canvas,), tuple(questions))


def _draw(rng: Random, canvas: Canvas, grey: int) -> dict[str, int]:
    """Draw a chart; returns the bars' values by colour, from left to right."""
    unit = min(rng.randint(7, 14), (canvas.height - FOOT - 6) // HIGHEST)
    base = canvas.height - FOOT - rng.randint(2, canvas.height - FOOT - HIGHEST * unit - 3)
    axis, faint = ((grey + step,) * 3 for step in ((110, 28) if grey < 128 else (-130, -30)))
    for value in range(1, HIGHEST + 1):
        canvas.rectangle(3, base - value * unit, canvas.width - 1, base - value * unit + 1, faint)
    canvas.rectangle(3, base, canvas.width - 1, base + 2, axis)
    canvas.rectangle(3, base - HIGHEST * unit, 4, base, axis)
    count = rng.randint(2, min(5, (canvas.width - 8) // 13))
    values = {name: rng.randint(0, HIGHEST) for name in rng.sample(list(COLOURS), count)}
    step = (canvas.width - 8) / count
    for index, (name, value) in enumerate(values.items()):
        width = rng.randint(9, max(9, min(26, int(step) - 4)))
        centre = 5 + step * (index + 0.5) + rng.uniform(-1, 1) * max(0.0, (step - width - 4) / 2)
        left = int(centre - width / 2)
        colour = shade(rng, name)
        canvas.rectangle(left, base - value * unit, left + width, base, colour)
        canvas.rectangle(left, base + 2, left + width, base + FOOT, colour)
        canvas.marks.append(Bar(name, value, (left, base - value * unit, left + width, base + FOOT)))
    return values
