"""What `phisight demo` shows: questions with the files of their pictures, and what came of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phisight.answer import Answer
from phisight.cli.album import Album, with_box
from phisight.evaluate.scoring import BoxHit, Contains, Verdict
from phisight.tasks import Sample
from phisight.tasks.question import Box, read_box

__all__ = ["Exhibit", "Outcome", "check_room", "hang", "judge"]

MARKED = "ground-answer"
"""The name of the picture with the box of the answer."""


@dataclass(frozen=True)
class Exhibit:
    """A question with the files of its pictures."""

    sample: Sample
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of an exhibit. box: that of a ground answer, if it has one; marked: the picture with this box."""

    exhibit: Exhibit
    answer: Answer
    verdict: Verdict
    box: Box | None = None
    marked: Path | None = None

    @property
    def first_token_seconds(self) -> float:
        stats = self.answer.stats
        return stats.preprocess_seconds + stats.encode_seconds + stats.prefill_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of decoding; None where nothing was decoded after the first token."""
        stats = self.answer.stats
        return stats.decode_steps / stats.decode_seconds if stats.decode_steps and stats.decode_seconds else None

    def as_json(self) -> dict[str, Any]:
        question = self.exhibit.sample.question
        return {
            "task": question.task,
            "kind": question.kind,
            "pictures": [str(path) for path in self.exhibit.files],
            "question": question.text,
            "expected": question.answer,
            "text": self.answer.text,
            "thought": self.answer.thought,
            "right": self.verdict.right,
            "box": self.box,
            "overlap": self.verdict.overlap,
            "marked": None if self.marked is None else str(self.marked),
            "finish_reason": self.answer.finish_reason,
            "first_token_seconds": self.first_token_seconds,
            "tokens_per_second": self.tokens_per_second,
            "stats": self.answer.stats.as_json(),
        }


def check_room(album: Album, samples: Iterable[Sample]) -> None:
    """That all pictures can be saved. Raises InputError."""
    album.check([*(name for each in samples for name in _names(each)), MARKED])


def hang(album: Album, samples: Iterable[Sample]) -> list[Exhibit]:
    """Save the pictures of all samples. Raises InputError."""
    album.remove(MARKED)  # it belongs to an answer that is to be given anew
    return [Exhibit(each, tuple(map(album.save, _names(each), each.pictures))) for each in samples]


def judge(exhibit: Exhibit, answer: Answer, album: Album) -> Outcome:
    """Whether an answer is right; a box that it gives is drawn into a copy of the picture. Raises InputError."""
    question = exhibit.sample.question
    if question.box is None:
        # Larger models answer in sentences.
        return Outcome(exhibit, answer, Contains((question.answer,)).judge(answer.text))
    verdict, box = BoxHit(question.box).judge(answer.text), read_box(answer.text)
    marked = None if box is None else album.save(MARKED, with_box(exhibit.sample.pictures[0], box))
    return Outcome(exhibit, answer, verdict, box, marked)


def _names(each: Sample) -> list[str]:
    """A name for each picture: read; two_images-1, two_images-2."""
    task, count = each.question.task, len(each.pictures)
    return [task] if count == 1 else [f"{task}-{number}" for number in range(1, count + 1)]
