"""The questions and answers of `phisight demo` for people, as they come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from phisight.answer import Chunk
from phisight.cli.asking import note_limit
from phisight.cli.console import Console
from phisight.cli.exhibits import Exhibit, Outcome
from phisight.cli.half_blocks import Colours, half_blocks, side_by_side
from phisight.tasks import Sample
from phisight.thought import Channel

__all__ = ["Transcript"]

ROWS = 16
"""Of a picture, at most."""
GAP = 4
"""Columns between two pictures."""
LABELS = {"question": "question  ", "thought": "thought   ", "answer": "answer    "}
INDENT = " " * len(LABELS["answer"])


class Transcript:
    """Writes exhibit after exhibit. colours: how pictures are shown; None leaves them out."""

    def __init__(self, console: Console, colours: Colours | None) -> None:
        self._console = console
        self._colours: Colours | None = colours
        self._channel: Channel | None = None  # of the line that is being written

    def begin(self, exhibit: Exhibit, number: int, total: int) -> None:
        """The task, its pictures and the question."""
        question = exhibit.sample.question
        self._channel = None
        files = ", ".join(map(str, exhibit.files))
        self._console.line(f"{question.task} ({number} of {total})" + (f": {files}" if files else ""))
        if self._colours and exhibit.files:
            for line in _shown(exhibit.sample, self._colours):
                self._console.line(line)
        self._console.line(LABELS["question"] + question.text)

    def show(self, chunk: Chunk) -> None:
        """The next piece of the thought or the answer, each on a line of its own with a label; the thought is dim."""
        if not chunk.text:
            return
        label = ""
        if chunk.channel != self._channel:
            if self._channel:
                self._console.line()
            label, self._channel = LABELS[chunk.channel], chunk.channel
        self._console.write(label + chunk.text, dim=chunk.channel == "thought")

    def end(self, outcome: Outcome) -> None:
        """The end of the answer's line, whether it is right, and what it took."""
        answer = outcome.answer
        if self._channel:
            self._console.line()
        if not answer.text:
            self._console.line(LABELS["answer"] + "(none)")
        note_limit(bool(answer.text), answer.finish_reason, self._console)
        for line in (*_verdict(outcome), _cost(outcome)):
            self._console.line(INDENT + line)
        self._console.line()


def _shown(sample: Sample, colours: Colours) -> list[str]:
    """The pictures of a question in half blocks, two of them side by side."""
    count = len(sample.pictures)
    # One column is left free: some terminals begin a new line once the last one is written.
    width = (shutil.get_terminal_size().columns - 1 - GAP * (count - 1)) // count
    lines, *others = (half_blocks(picture, max(width, 1), ROWS, colours) for picture in sample.pictures)
    for other in others:
        lines = side_by_side(lines, other, GAP)
    return lines


def _verdict(outcome: Outcome) -> Iterator[str]:
    yield "right" if outcome.verdict.right else f"wrong: it is {outcome.exhibit.sample.question.answer}"
    if outcome.marked is not None and outcome.verdict.overlap is not None:
        yield f"its box overlaps the true one by {100 * outcome.verdict.overlap:.0f} %: {outcome.marked}"


def _cost(outcome: Outcome) -> str:
    """What the answer took: "204 x 86 pixels -> 78 image tokens, ..."."""
    stats, rate = outcome.answer.stats, outcome.tokens_per_second
    sizes = " and ".join(f"{pixels.shape[1]} x {pixels.shape[0]}" for pixels in outcome.exhibit.sample.pictures)
    pictures = f"{sizes} pixels -> {stats.image_tokens} image tokens, " if sizes else ""
    speed = f", {rate:.0f} tokens/s" if rate else ""
    return (
        f"{pictures}{stats.text_tokens} text tokens; first token after {outcome.first_token_seconds:.2f} s; "
        f"{stats.generated_tokens} tokens{speed}"
    )
