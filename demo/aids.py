"""Pictures and questions that only training uses: dense pages for the tower, and steps towards the tasks' questions."""

from __future__ import annotations

from random import Random

from phisight.tasks import Question, Scene
from phisight.tasks.canvas import Canvas, Control, Text, paper
from phisight.tasks.read import WORDS, draw_line, random_code, spelled

__all__ = ["more_questions", "page_scene"]

LINE_HEIGHT = 27
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def page_scene(rng: Random, size: tuple[int, int]) -> Scene:
    """As many lines of codes as there is room for, with a question about each."""
    background = paper(rng)
    canvas = Canvas(size, background)
    count = max(1, min(5, size[0] // LINE_HEIGHT))
    step = size[0] // count
    questions = []
    for index in range(count):
        rows = (index * step, (index + 1) * step)
        text = draw_line(rng, canvas, random_code(rng), background, rows=rows, plate=rng.random() < 0.2)
        ask = rng.choice((f"What does line {index + 1} say?", f"Read line {index + 1}."))
        questions.append(Question("line", "line", ask, spelled(text), text))
    rng.shuffle(questions)
    return Scene((canvas,), tuple(questions))


def more_questions(rng: Random, scene: Scene) -> list[Question]:
    """About single characters of a line, and whether there is a certain control."""
    if len(scene.canvases) > 1:
        return []
    marks = scene.canvases[0].marks
    texts = [mark for mark in marks if isinstance(mark, Text)]
    words = [mark.word for mark in marks if isinstance(mark, Control) and mark.kind != "label"]
    if len(texts) == 1:
        return [_character(rng, texts[0].text) for _ in range(2)]
    if words:
        return [_find(rng, words)]
    return []


def _character(rng: Random, text: str) -> Question:
    index = rng.randrange(len(text))
    last = index == len(text) - 1 and rng.random() < 0.5
    place = "last" if last else ORDINALS[index]
    ask = rng.choice((f"What is the {place} character?", f"Which character is {place}?"))
    return Question("character", "character", ask, spelled(text[: index + 1]), text[index])


def _find(rng: Random, words: list[str]) -> Question:
    there = rng.random() < 0.5
    word = rng.choice(words if there else [word for word in WORDS if word not in words])
    return Question("find", "find", f"Is there a {word} control?", word, "yes" if there else "no")
