"""Cases from the library of tasks: each is drawn from its seed when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phisight.evaluate.cases import Case
from phisight.evaluate.scoring import BoxHit, Exact, Expected
from phisight.tasks import Question, sample

__all__ = ["DrawnCases"]


@dataclass(frozen=True)
class DrawnCases:
    """The questions of one task of `phisight.tasks` for a range of seeds."""

    task: str
    seeds: range

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Case]:
        for seed in self.seeds:
            drawn = sample(self.task, seed)
            question = drawn.question
            yield Case(self.task, question.kind, "seed", seed, question.text, drawn.pictures, _expected(question))


def _expected(question: Question) -> Expected:
    return Exact((question.answer,)) if question.box is None else BoxHit(question.box)
