"""Ask a model the questions of some cases, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter

from PIL import Image

from phisight.answer import Answer
from phisight.errors import PhisightError
from phisight.evaluate.cases import Case
from phisight.evaluate.scoring import Verdict
from phisight.images import open_image
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.prompt import Message, Mode, SystemBlock, user_message

__all__ = ["EvaluationSettings", "Result", "evaluate"]

GREY = (128, 128, 128)


@dataclass(frozen=True)
class EvaluationSettings:
    """How questions are put. `opening` goes before each, `mode` is for those that have none of their own.

    blank: every picture becomes an even grey one of its size, which tells what can be answered without seeing.
    """

    options: GenerateOptions
    mode: Mode = "auto"
    opening: tuple[Message, ...] = ()
    system_block: SystemBlock = "keep"
    max_patches: int | None = None
    blank: bool = False


@dataclass(frozen=True)
class Result:
    """A case, here without its pictures, and what came of it: an answer, or in words why there is none.

    size: width and height in pixels of its first picture. seconds: of everything from opening the pictures on.
    """

    case: Case
    size: tuple[int, int] | None
    answer: Answer | None
    error: str | None
    seconds: float

    @property
    def text(self) -> str:
        """The answer after the thought, without white space around it; empty where there is none."""
        return "" if self.answer is None else self.answer.text.strip()

    @cached_property
    def verdict(self) -> Verdict:
        return self.case.expected.judge(self.text)


def evaluate(
    model: Model, cases: Iterable[Case], settings: EvaluationSettings
) -> Iterator[tuple[Result, tuple[Image.Image, ...]]]:
    """Each case's result, and the pictures that the model saw. A case that fails is a result too."""
    for case in cases:
        started = perf_counter()
        pictures: tuple[Image.Image, ...] = ()
        answer, error = None, None
        try:
            pictures = _pictures(case, settings.blank)
            answer = _ask(model, case, pictures, settings)
        except (PhisightError, MemoryError) as failure:  # of one picture, after perhaps hours of others
            error = " ".join(str(failure).split()) or type(failure).__name__
        size = pictures[0].size if pictures else None
        yield Result(replace(case, pictures=()), size, answer, error, perf_counter() - started), pictures


def _pictures(case: Case, blank: bool) -> tuple[Image.Image, ...]:
    upright = (open_image(picture) for picture in case.pictures)
    return tuple(Image.new("RGB", picture.size, GREY) if blank else picture for picture in upright)


def _ask(model: Model, case: Case, pictures: tuple[Image.Image, ...], settings: EvaluationSettings) -> Answer:
    return model.generate(
        [*settings.opening, user_message(case.question, len(pictures))],
        pictures,
        mode=case.mode or settings.mode,
        options=settings.options,
        system_block=settings.system_block,
        max_patches=settings.max_patches,
    )
