"""Right answers, and what an answer is worth. One class for each way of judging, with its name in files and reports.

exact     the answer is one of the accepted texts, but for white space around it
contains  one of the accepted texts stands in the answer as whole words, in capitals or not
number    the last number in the answer is the expected one
box       the centre of the first [x1, y1, x2, y2] in the answer lies in the expected box; the overlap is told too
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from phisight.tasks.question import Box, box_overlap, centre_inside, read_box

__all__ = ["BoxHit", "Contains", "Exact", "Expected", "Number", "Verdict", "last_number"]


@dataclass(frozen=True)
class Verdict:
    """overlap: intersection over union with the expected box, 0 for an answer without a box; None for other metrics."""

    right: bool
    overlap: float | None = None


@dataclass(frozen=True)
class _Texts:
    accepted: tuple[str, ...]

    @property
    def as_json(self) -> Any:
        return self.accepted[0] if len(self.accepted) == 1 else list(self.accepted)


@dataclass(frozen=True)
class Exact(_Texts):
    """The answer is one of `accepted`."""

    metric: ClassVar[str] = "exact"
    key: ClassVar[str] = "exact_match"

    def judge(self, answer: str) -> Verdict:
        return Verdict(answer.strip() in {text.strip() for text in self.accepted})

    def right_answers(self) -> Iterator[str]:
        """Answers that are right: of each metric those that other cases may share."""
        yield from {text.strip(): None for text in self.accepted}


@dataclass(frozen=True)
class Contains(_Texts):
    """One of `accepted` stands in the answer."""

    metric: ClassVar[str] = "contains"
    key: ClassVar[str] = "contains_match"

    def judge(self, answer: str) -> Verdict:
        said = _folded(answer)
        return Verdict(any(_stands_in(_folded(text), said) for text in self.accepted))

    def right_answers(self) -> Iterator[str]:
        yield from {_folded(text): None for text in self.accepted}


@dataclass(frozen=True)
class Number:
    """The last number in the answer is at most `tolerance` away from `value`."""

    metric: ClassVar[str] = "number"
    key: ClassVar[str] = "number_match"
    value: float
    tolerance: float = 0.0

    def judge(self, answer: str) -> Verdict:
        found = last_number(answer)
        if found is None:
            return Verdict(False)
        rounding = 1e-9 * max(abs(self.value), abs(self.tolerance))  # 0.3 is 0.2 +- 0.1, though not in binary
        return Verdict(abs(found - self.value) <= self.tolerance + rounding)

    def right_answers(self) -> Iterator[str]:
        yield f"{self.value:.12g}"

    @property
    def as_json(self) -> Any:
        return self.value


@dataclass(frozen=True)
class BoxHit:
    """The answer's box has its centre in `box`."""

    metric: ClassVar[str] = "box"
    key: ClassVar[str] = "box_hit"
    box: Box

    def judge(self, answer: str) -> Verdict:
        found = read_box(answer)
        if found is None:
            return Verdict(False, 0.0)
        return Verdict(centre_inside(found, self.box), box_overlap(found, self.box))

    def right_answers(self) -> Iterator[str]:
        """The points inside on a grid of fiftieths, each as a box without extent."""
        x1, y1, x2, y2 = (50 * edge for edge in self.box)
        for column in range(math.ceil(x1), math.floor(x2) + 1):
            for row in range(math.ceil(y1), math.floor(y2) + 1):
                x, y = column / 50, row / 50
                point = f"[{x:.2f}, {y:.2f}, {x:.2f}, {y:.2f}]"
                if self.judge(point).right:
                    yield point

    @property
    def as_json(self) -> Any:
        return list(self.box)


Expected: TypeAlias = Exact | Contains | Number | BoxHit

_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
"""A minus belongs to a number unless it follows one; commas may part thousands; the point is decimal."""


def last_number(answer: str) -> float | None:
    """The last number that a text names, or None."""
    found = _NUMBER.findall(answer)
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


_LETTER = "0-9A-Za-z\u00c0-\u024f\u0370-\u052f"
"""Digits and the letters of scripts that put spaces between words: Latin, Greek, Cyrillic."""


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _stands_in(text: str, said: str) -> bool:
    """Whether a text stands in another one, and not as a part of a longer word or number."""
    before, after = rf"(?<![{_LETTER}])(?<!\d[.,])", rf"(?![{_LETTER}])(?![.,]\d)"
    return re.search(before + re.escape(text) + after, said) is not None
