"""Results summed up: shares of right answers with their intervals, by task, subtask and shape of the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phisight.evaluate.intervals import wilson_interval
from phisight.evaluate.run import Result
from phisight.evaluate.scoring import Expected

__all__ = ["Constant", "Score", "TaskReport", "most_frequent_answer", "shape_of"]

SHAPES = ("tall", "upright", "square", "wide", "panorama")


def shape_of(size: tuple[int, int]) -> str:
    """Of a picture's width and height: tall below 1:2, upright to 4:5, square to 5:4, wide to 2:1, panorama above."""
    width, height = size
    if 2 * width < height:
        return "tall"
    if 5 * width < 4 * height:
        return "upright"
    if 4 * width <= 5 * height:
        return "square"
    return "wide" if width <= 2 * height else "panorama"


@dataclass(frozen=True)
class Score:
    """Shares of right answers among `n` results: one for each metric among them, by its key, and over all of them.

    mean_iou: over those with a box; None if there is none.
    """

    n: int
    right: int
    shares: dict[str, float]
    mean_iou: float | None

    @classmethod
    def of(cls, results: Sequence[Result]) -> Score:
        verdicts: dict[str, list[bool]] = {}
        for result in results:
            verdicts.setdefault(result.case.expected.key, []).append(result.verdict.right)
        overlaps = [overlap for result in results if (overlap := result.verdict.overlap) is not None]
        return cls(
            len(results),
            sum(sum(right) for right in verdicts.values()),
            {key: sum(right) / len(right) for key, right in verdicts.items()},
            sum(overlaps) / len(overlaps) if overlaps else None,
        )

    @property
    def share(self) -> float:
        return self.right / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share over all, 95 %."""
        return wilson_interval(self.right, self.n)

    def as_json(self) -> dict[str, Any]:
        overlap = {} if self.mean_iou is None else {"mean_iou": self.mean_iou}
        return {"n": self.n, "right": self.right, **self.shares, **overlap, "interval": list(self.interval)}


@dataclass(frozen=True)
class Constant:
    """The answer that is right most often if it is always given, and its share: what can be had without looking."""

    answer: str
    share: float


def most_frequent_answer(expected: Sequence[Expected]) -> Constant:
    """For boxes a point, as a box without extent."""
    counts = Counter(answer for each in expected for answer in each.right_answers())
    if not counts:
        return Constant("", 0.0)
    answer, count = counts.most_common(1)[0]
    return Constant(answer, count / len(expected))


@dataclass(frozen=True)
class TaskReport:
    """What came of the `planned` cases of a task; fewer were asked if the evaluation was interrupted.

    kinds, shapes: scores by subtask and by shape of the first picture. cut: answers that the limit of tokens ended.
    thoughts: answers with a thought. errors: the results without an answer.
    """

    planned: int
    score: Score
    constant: Constant
    kinds: dict[str, Score]
    shapes: dict[str, Score]
    errors: tuple[Result, ...]
    cut: int
    thoughts: int
    generated_tokens: int
    thought_tokens: int
    image_tokens: int
    seconds: float

    @classmethod
    def of(cls, results: Sequence[Result], planned: int) -> TaskReport:
        answers = [result.answer for result in results if result.answer is not None]
        return cls(
            planned,
            Score.of(results),
            most_frequent_answer([result.case.expected for result in results]),
            _scores([(result.case.kind, result) for result in results], order=None),
            _scores([(result.size and shape_of(result.size), result) for result in results], order=SHAPES),
            errors=tuple(result for result in results if result.error is not None),
            cut=sum(answer.finish_reason == "length" for answer in answers),
            thoughts=sum(bool(answer.thought.strip()) for answer in answers),
            generated_tokens=sum(answer.stats.generated_tokens for answer in answers),
            thought_tokens=sum(answer.stats.thought_tokens for answer in answers),
            image_tokens=sum(answer.stats.image_tokens for answer in answers),
            seconds=sum(result.seconds for result in results),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            **self.score.as_json(),
            "planned": self.planned,
            "constant_answer": self.constant.share,
            "most_frequent_answer": self.constant.answer,
            "kinds": {name: score.as_json() for name, score in self.kinds.items()},
            "aspect_ratios": {name: score.as_json() for name, score in self.shapes.items()},
            "errors": [
                {each.case.origin: each.case.number, "id": each.case.id, "error": each.error} for each in self.errors
            ],
            "cut": self.cut,
            "thoughts": self.thoughts,
            "generated_tokens": self.generated_tokens,
            "thought_tokens": self.thought_tokens,
            "image_tokens": self.image_tokens,
            "seconds": self.seconds,
        }


def _scores(results: Sequence[tuple[str | None, Result]], order: Sequence[str] | None) -> dict[str, Score]:
    """A score for each name, in the order given or that of the alphabet; results without a name are left out."""
    groups: dict[str, list[Result]] = {}
    for name, result in results:
        if name is not None:
            groups.setdefault(name, []).append(result)
    names = sorted(groups) if order is None else [name for name in order if name in groups]
    return {name: Score.of(groups[name]) for name in names}
