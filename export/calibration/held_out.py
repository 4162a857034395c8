"""Data that is kept from calibration, on which quantised weights are judged: the positions that count, the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np

from phisight.backends.ort_session import SessionSettings
from phisight.export.calibration.data import CalibrationData, CalibrationSequence
from phisight.export.calibration.inputs import embedded, write_inputs
from phisight.export.calibration.work import Boundary, WorkDirectory
from phisight.export.checkpoint import Checkpoint
from phisight.quant.stored_types import Restorer
from phisight.sequence import IMAGE_SLOT
from phisight.tokenizer import Tokenizer

__all__ = ["HeldOut", "hold_out"]

TURN = "<|im_sep|>"
"""Behind it begins what the assistant says, in the last turn the answer."""
AT_ONCE = 256
"""Positions whose logits are in memory at once: 0.1 GB with the real vocabulary."""


@dataclass(frozen=True)
class HeldOut:
    """Sequences, and the `spans` of positions that count, (start, stop) in all sequences one after the other.

    A position counts whose next token belongs to an answer, or, where there are no questions, to the second half of a
    text. `questions` says which of the two it is.
    """

    data: CalibrationData
    spans: tuple[tuple[int, int], ...]
    questions: bool

    @property
    def positions(self) -> int:
        return self.data.positions

    @cached_property
    def scored(self) -> int:
        """How many positions count."""
        return sum(stop - start for start, stop in self.spans)

    def batches(self) -> list[list[tuple[int, int]]]:
        """The spans in groups of about AT_ONCE positions."""
        groups: list[list[tuple[int, int]]] = []
        count = AT_ONCE
        for start, stop in self.spans:
            if count + stop - start > AT_ONCE:
                groups.append([])
                count = 0
            groups[-1].append((start, stop))
            count += stop - start
        return groups

    def inputs(self, checkpoint: Checkpoint, folder: Path, settings: SessionSettings) -> Boundary:
        """What goes into the first layer, made if an earlier call did not. Raises CheckpointError, EngineError."""
        work = WorkDirectory(folder, self.data.digest, checkpoint.config.decoder.hidden_size)
        if work.boundary is None:
            write_inputs(checkpoint, self.data, work, settings, lambda positions: None)
        return work.open(0)

    def with_embeddings(
        self, checkpoint: Checkpoint, source: Boundary, target: Boundary, at: int, restore: Restorer
    ) -> None:
        """Inputs as a table that was stored gives them: from position `at` of `target` on."""
        start = 0
        for sequence in self.data.sequences:
            rows = source.read(start, len(sequence))
            ids = np.array([id_ for id_ in sequence.ids if id_ != IMAGE_SLOT])
            rows[~sequence.is_image()] = embedded(checkpoint, ids, restore)
            target.write(at + start, rows)
            start += len(sequence)


def hold_out(data: CalibrationData, tokens: int, tokenizer: Tokenizer) -> tuple[CalibrationData, HeldOut]:
    """What is left for calibration, and about `tokens` positions of questions, or of text if there are none.

    Sequences are drawn from a seed, at most half of them; a single one serves both.
    """
    turn = tokenizer.control_tokens.get(TURN)
    questions = [number for number, each in enumerate(data.sequences) if turn in each.ids]
    pool = questions or list(range(len(data.sequences)))
    Random("phisight held out").shuffle(pool)
    chosen: set[int] = set()
    count = 0
    for number in pool[: max(1, len(pool) // 2)]:
        if count >= tokens:
            break
        chosen.add(number)
        count += len(data.sequences[number])
    kept = tuple(each for number, each in enumerate(data.sequences) if number not in chosen)
    held = tuple(each for number, each in enumerate(data.sequences) if number in chosen)
    spans = []
    at = 0
    for sequence in held:
        start = _answer(sequence, turn) if questions and turn is not None else len(sequence) // 2
        spans.append((at + start, at + max(start + 1, len(sequence) - 1)))
        at += len(sequence)
    return CalibrationData(kept or held), HeldOut(CalibrationData(held), tuple(spans), bool(questions))


def _answer(sequence: CalibrationSequence, turn: int) -> int:
    """The position that predicts the answer's first token."""
    behind = sequence.ids[::-1].index(turn)
    return len(sequence) - 1 - behind
