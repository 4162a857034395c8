"""Pictures with questions for the built-in model: texts to read and charts, of seeds that evaluation leaves alone."""

from __future__ import annotations

from PIL import Image

from phisight.tasks import sample

__all__ = ["questions"]

FIRST_SEED = 1_000_000


def questions(count: int, seed: int = 0) -> list[tuple[Image.Image, str, str]]:
    """Picture, question and right answer: half texts, half charts."""
    drawn = [sample(("read", "chart")[number % 2], FIRST_SEED + seed + number) for number in range(count)]
    return [(Image.fromarray(each.pictures[0]), each.question.text, each.question.answer) for each in drawn]
