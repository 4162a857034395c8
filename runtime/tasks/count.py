"""count: circles, squares and triangles in colours; how many are of a shape, a colour, or both?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from phisight.tasks.canvas import COLOURS, Canvas, Colour, grey_paper, shade
from phisight.tasks.question import Question
from phisight.tasks.scene import Scene

__all__ = ["SHAPES", "Thing", "Wanted", "count_scene", "draw_things", "place", "some_wanted", "tally"]

SHAPES = ("circle", "square", "triangle")
MOST = 6
"""Of what is asked for; a picture holds up to MOST_THINGS."""
MOST_THINGS = 9
CELL = 23
ASK = ("How many {} are there?", "Count the {}.", "How many {} do you see?", "What is the number of {}?")


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str


@dataclass(frozen=True)
class Wanted:
    """What is asked for: a shape, a colour, both or, with neither, everything."""

    shape: str | None
    colour: str | None

    def __call__(self, thing: Thing) -> bool:
        return self.shape in (None, thing.shape) and self.colour in (None, thing.colour)

    def __str__(self) -> str:
        words = [self.colour] if self.colour else []
        return " ".join([*words, f"{self.shape}s" if self.shape else "objects"])


def count_scene(rng: Random, size: tuple[int, int]) -> Scene:
    """The first question's answer is drawn evenly from 0 to 6, as far as the picture has room."""
    room = min(MOST_THINGS, (size[0] // CELL) * (size[1] // CELL))
    wanted = some_wanted(rng)
    count = rng.randint(0, min(MOST, room))
    others = rng.randint(0 if count else 1, max(0 if count else 1, room - count))
    if wanted == Wanted(None, None):
        others = 0 if count else 1
    shapes, colours = rng.sample(SHAPES, rng.randint(2, 3)), rng.sample(list(COLOURS), rng.randint(2, 4))
    things = [_thing(rng, wanted, True, shapes, colours) for _ in range(count)]
    things += [_thing(rng, wanted, False, shapes, colours) for _ in range(others)]
    rng.shuffle(things)
    places = place(rng, size, len(things))
    canvas = draw_things(rng, size, grey_paper(rng), things, places)
    asked = [wanted]
    for _ in range(4):
        thing = rng.choice(things)
        more = rng.choice((Wanted(thing.shape, None), Wanted(None, thing.colour), Wanted(thing.shape, thing.colour)))
        if more not in asked:
            asked.append(more)
    centres = [(x / size[1], y / size[0]) for x, y, _ in places]
    return Scene((canvas,), tuple(_question(rng, wanted, things, centres) for wanted in asked))


def some_wanted(rng: Random) -> Wanted:
    kind = rng.choices(("both", "shape", "colour", "all"), (0.45, 0.25, 0.25, 0.05))[0]
    return Wanted(
        rng.choice(SHAPES) if kind in ("both", "shape") else None,
        rng.choice(list(COLOURS)) if kind in ("both", "colour") else None,
    )


def tally(wanted: Callable[[Thing], bool], things: Sequence[Thing]) -> int:
    return sum(wanted(thing) for thing in things)


def place(rng: Random, size: tuple[int, int], count: int) -> list[tuple[float, float, int]]:
    """x, y and height of so many things that do not touch."""
    rows, columns = size[0] // CELL, size[1] // CELL
    spots = rng.sample([(row, column) for row in range(rows) for column in range(columns)], count)
    height, width = size[0] / rows, size[1] / columns
    places = []
    for row, column in spots:
        side = rng.randint(12, 19)
        x = column * width + 1 + side / 2 + rng.random() * max(0.0, width - side - 3)
        y = row * height + 1 + side / 2 + rng.random() * max(0.0, height - side - 3)
        places.append((x, y, side))
    return places


def draw_things(
    rng: Random,
    size: tuple[int, int],
    background: Colour,
    things: Sequence[Thing],
    places: Sequence[tuple[float, float, int]],
) -> Canvas:
    canvas = Canvas(size, background)
    for thing, (x, y, side) in zip(things, places, strict=True):
        canvas.shape(thing.shape, shade(rng, thing.colour), thing.colour, x, y, side)
    return canvas


def _thing(rng: Random, wanted: Wanted, matching: bool, shapes: Sequence[str], colours: Sequence[str]) -> Thing:
    """A thing that is wanted, or one that is not but may share its shape or colour."""
    while True:
        shape = wanted.shape if wanted.shape and (matching or rng.random() < 0.4) else rng.choice(shapes)
        colour = wanted.colour if wanted.colour and (matching or rng.random() < 0.4) else rng.choice(colours)
        thing = Thing(shape, colour)
        if wanted(thing) == matching or wanted == Wanted(None, None):
            return thing


def _question(rng: Random, wanted: Wanted, things: Sequence[Thing], centres: Sequence[tuple[float, float]]) -> Question:
    """The thought points at each thing that counts, from left to right, with its number."""
    kind = {(True, True): "both", (True, False): "shape", (False, True): "colour", (False, False): "all"}
    text = rng.choice(ASK).format(wanted)
    found = sorted((f"{x:.2f}", f"{y:.2f}") for thing, (x, y) in zip(things, centres, strict=True) if wanted(thing))
    points = [f"{number}:{x},{y}" for number, (x, y) in enumerate(found, 1)]
    thought, answer = " ".join(points) or "none", str(len(found))
    return Question(
        "count", kind[wanted.shape is not None, wanted.colour is not None], text, thought, answer, thinks=True
    )
