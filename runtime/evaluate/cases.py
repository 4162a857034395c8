"""What is asked: one question with its pictures, and what a right answer is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from phisight.evaluate.scoring import Expected
from phisight.images import ImageSource
from phisight.prompt import Mode

__all__ = ["Case", "Cases"]


@dataclass(frozen=True)
class Case:
    """One question.

    task: the group in which it counts. kind: its subtask, None if it has none.
    origin and number: the seed that it was drawn from, or its line in the user's file.
    mode: where the question itself asks for a thought or for none. id: the user's own.
    """

    task: str
    kind: str | None
    origin: Literal["seed", "line"]
    number: int
    question: str
    pictures: tuple[ImageSource, ...]
    expected: Expected
    mode: Mode | None = None
    id: str | int | None = None


class Cases(Protocol):
    """The cases of a task. They may be made one by one: pictures are large."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Case]: ...
