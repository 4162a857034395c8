"""two_images: compare two pictures of numbers, codes or objects.

The thoughts set side by side what is to be compared, a word or character at a time, up to the first difference: a small
model that lists all of one picture and then all of the other does not find where the lists differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from random import Random

from phisight.tasks.canvas import COLOURS, Canvas, grey_paper, paper
from phisight.tasks.count import CELL, SHAPES, Thing, Wanted, draw_things, place, tally
from phisight.tasks.question import Question
from phisight.tasks.read import CODE_CHARACTERS, draw_line, random_code
from phisight.tasks.scene import Scene

__all__ = ["two_images_scene"]

Size = tuple[int, int]
MOST_THINGS = 4
"""Of a picture: a thought may list them all."""


def two_images_scene(rng: Random, size: Size) -> Scene:
    """Both pictures have the same size."""
    draw = rng.choices((_number, _more, _same_objects, _same_code, _total, _change), (22, 22, 12, 10, 17, 17))[0]
    return draw(rng, size)


def _number(rng: Random, size: Size) -> Scene:
    first, second = rng.sample(range(1, 100), 2)
    if rng.random() < 0.5:  # the same tens
        tens = 10 * rng.randint(1, 9)
        first, second = (tens + ones for ones in rng.sample(range(10), 2))
    canvases = tuple(_text_picture(rng, size, str(value))[0] for value in (first, second))
    questions = []
    for word, wanted in rng.sample((("larger", max), ("smaller", min)), 2):
        text = rng.choice(("Which picture shows the {} number?", "In which picture is the number {}?")).format(word)
        answer = "first" if first == wanted(first, second) else "second"
        thought = f"{first}, {second}: {_side_by_side(f'{first:02}', f'{second:02}')} {_sign(first, second)}"
        questions.append(Question("two_images", "number", text, thought, answer, thinks=True))
    return Scene(canvases, tuple(questions))


def _same_code(rng: Random, size: Size) -> Scene:
    code = random_code(rng)[:5]
    first, code = _text_picture(rng, size, code)
    other = code
    if rng.random() < 0.5:
        index = rng.randrange(len(code))
        other = code[:index] + rng.choice(CODE_CHARACTERS.replace(code[index], "")) + code[index + 1 :]
    while True:  # until the second face is narrow enough for all of it
        second, shown = _text_picture(rng, size, other)
        if shown == other:
            break
    text = rng.choice(("Do both pictures show the same code?", "Is the same text in both pictures?"))
    thought = _compared(code, other)
    answer = "yes" if code == other else "no"
    return Scene((first, second), (Question("two_images", "same", text, thought, answer, thinks=True),))


def _same_objects(rng: Random, size: Size) -> Scene:
    first, places = _some_things(rng, size)
    second, second_places = list(first), list(places)
    if rng.random() < 0.5:
        index = rng.randrange(len(first))
        thing = first[index]
        change = rng.random()
        if change < 0.4:
            second[index] = Thing(thing.shape, _other(rng, COLOURS, thing.colour))
        elif change < 0.7 or len(first) == 1:
            second[index] = Thing(_other(rng, SHAPES, thing.shape), thing.colour)
        else:
            del second[index], second_places[index]
    text = rng.choice(("Are the two pictures the same?", "Do both pictures show the same?"))
    thought = _compared(_words(first), _words(second))
    answer = "yes" if first == second else "no"
    return Scene(
        _draw_pair(rng, size, first, places, second, second_places),
        (Question("two_images", "same", text, thought, answer, thinks=True),),
    )


def _change(rng: Random, size: Size) -> Scene:
    """One object has another colour in the second picture."""
    first, places = _some_things(rng, size)
    index = rng.randrange(len(first))
    colour = _other(rng, COLOURS, first[index].colour)
    second = [*first[:index], Thing(first[index].shape, colour), *first[index + 1 :]]
    text = rng.choice(("One object changed. Which colour did it get?", "Which colour did the changed object get?"))
    thought = _compared(_words(first), _words(second))
    return Scene(
        _draw_pair(rng, size, first, places, second, places),
        (Question("two_images", "change", text, thought, colour, thinks=True),),
    )


def _more(rng: Random, size: Size) -> Scene:
    while True:
        (first, places), (second, second_places) = _some_things(rng, size), _some_things(rng, size)
        wanted = [Wanted(None, None), *(Wanted(shape, None) for shape in SHAPES)]
        wanted += [Wanted(None, colour) for colour in COLOURS]
        unequal = [each for each in wanted if tally(each, first) != tally(each, second)]
        if unequal:
            break
    questions = []
    for each in rng.sample(unequal, min(2, len(unequal))):
        counts = tally(each, first), tally(each, second)
        text = rng.choice(("Which picture has more {}?", "In which picture are there more {}?")).format(each)
        answer = "first" if counts[0] > counts[1] else "second"
        thought = f"first {counts[0]}, second {counts[1]}: {_sign(*counts)}"
        questions.append(Question("two_images", "more", text, thought, answer, thinks=True))
    return Scene(_draw_pair(rng, size, first, places, second, second_places), tuple(questions))


def _total(rng: Random, size: Size) -> Scene:
    (first, places), (second, second_places) = _some_things(rng, size), _some_things(rng, size)
    present = rng.choice([*first, *second])
    questions = []
    for each in rng.sample((Wanted(None, None), Wanted(present.shape, None), Wanted(None, present.colour)), 2):
        a, b = tally(each, first), tally(each, second)
        text = rng.choice(("How many {} are in both pictures together?", "Count the {} in both pictures.")).format(each)
        questions.append(Question("two_images", "total", text, f"{a}, {b}, {a}+{b}={a + b}", str(a + b), thinks=True))
    return Scene(_draw_pair(rng, size, first, places, second, second_places), tuple(questions))


def _text_picture(rng: Random, size: Size, text: str) -> tuple[Canvas, str]:
    background = paper(rng)
    canvas = Canvas(size, background)
    return canvas, draw_line(rng, canvas, text, background, shortest=2)


def _some_things(rng: Random, size: Size) -> tuple[list[Thing], list[tuple[float, float, int]]]:
    """Things in reading order, few enough shapes and colours that some are alike."""
    count = rng.randint(1, min(MOST_THINGS, (size[0] // CELL) * (size[1] // CELL)))
    shapes, colours = rng.sample(SHAPES, rng.randint(1, 3)), rng.sample(list(COLOURS), rng.randint(1, 3))
    places = sorted(place(rng, size, count), key=lambda spot: (spot[1] * (size[0] // CELL) // size[0], spot[0]))
    return [Thing(rng.choice(shapes), rng.choice(colours)) for _ in range(count)], places


def _draw_pair(
    rng: Random,
    size: Size,
    first: list[Thing],
    places: list[tuple[float, float, int]],
    second: list[Thing],
    second_places: list[tuple[float, float, int]],
) -> tuple[Canvas, Canvas]:
    background = grey_paper(rng)
    return draw_things(rng, size, background, first, places), draw_things(rng, size, background, second, second_places)


def _words(things: Sequence[Thing]) -> list[str]:
    return [word for thing in things for word in (thing.colour, thing.shape)]


def _compared(first: Sequence[str], second: Sequence[str]) -> str:
    """Such as "red red, circle square!", or with a full stop if nothing differs."""
    return _side_by_side(first, second) + ("." if first == second else "!")


def _side_by_side(first: Sequence[str], second: Sequence[str]) -> str:
    """Pairs up to the first that differs."""
    pairs = []
    for a, b in zip_longest(first, second, fillvalue="none"):
        pairs.append(f"{a} {b}")
        if a != b:
            break
    return ", ".join(pairs)


def _sign(a: int, b: int) -> str:
    return ">" if a > b else "<"


def _other(rng: Random, options: Iterable[str], unlike: str) -> str:
    return rng.choice([option for option in options if option != unlike])
