"""Pictures and questions as rows of tokens: several questions share a picture, each sees only it and itself.

A row is: opening of the user's turn, image tokens, then blocks. A block is one question with its answer; its positions
go on from the picture, and a mask keeps the blocks apart, so each is the same as a prompt of its own, but the picture
is paid for once. What room is left holds sums, in blocks that do not see the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from phisight.prompt import DIRECT, THINK, THINK_END
from phisight.tasks.arithmetic import arithmetic_question
from phisight.tasks.question import Question
from phisight.training.vocabulary import Vocabulary

__all__ = ["Dialogue", "Rows", "Target", "make_rows"]

OTHER_WAY = {False: 0.12, True: 0.25}
"""How often a question is answered the other way than is best for it: with a thought, or without."""
CUT_THOUGHTS = 0.05
"""How often a thought ends early, as under a thinking budget."""


@dataclass(frozen=True)
class Target:
    """A token to be predicted: in which row, at which place behind the picture, of which question."""

    row: int
    place: int
    token: int
    question: int


@dataclass(frozen=True)
class Rows:
    """Tensors are (rows, length), int64: what comes behind the picture."""

    ids: Tensor
    positions: Tensor
    blocks: Tensor
    """Number of the block, from 1; 0 is padding."""
    blind: Tensor
    """Whether the block does not see the picture, bool."""
    targets: tuple[Target, ...]
    questions: tuple[Question, ...]


class Dialogue:
    """The turns around a question, in tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        one = vocabulary.one
        self.opening = [one("<|im_start|>"), *vocabulary.ids("user"), one("<|im_sep|>")]
        self.after_picture = vocabulary.ids("\n")
        self._answer = [one("<|im_end|>"), one("<|im_start|>"), *vocabulary.ids("assistant"), one("<|im_sep|>")]
        self._end, self._think, self._think_end, self._direct = map(one, ("<|im_end|>", THINK, THINK_END, DIRECT))

    def block(self, question: Question, rng: Random) -> tuple[list[int], int]:
        """A question's tokens from its first word to the end of the answer, and how many of them are given.

        How the answer begins is the model's choice, and so learned, only where it is the best way.
        """
        ids = self.vocabulary.ids
        other_way = rng.random() < OTHER_WAY[question.thinks]
        given = [*ids(question.text), *self._answer]
        if question.thinks == other_way:
            answer = [self._direct]
            known = len(given) + other_way
        else:
            thought = ids(question.thought)
            cut = rng.random() < CUT_THOUGHTS
            if cut:
                thought = thought[: rng.randrange(len(thought) + 1)]
            answer = [self._think, *thought, self._think_end]
            known = len(given) + (len(answer) if cut else other_way)
        return [*given, *answer, *ids(question.answer), self._end], known


def make_rows(
    dialogue: Dialogue,
    questions: Sequence[Sequence[Question]],
    *,
    prefix: int,
    length: int,
    rng: Random,
) -> Rows:
    """One row for each picture's questions, as many as fit in `length` tokens behind a prefix of `prefix` positions."""
    rows: list[list[tuple[int, int, int, bool]]] = []
    targets: list[Target] = []
    asked: list[Question] = []
    for index, candidates in enumerate(questions):
        row: list[tuple[int, int, int, bool]] = []
        waiting = list(candidates)
        number = 0
        while True:
            blind = not waiting
            question = arithmetic_question(rng) if blind else waiting.pop(0)
            tokens, given = dialogue.block(question, rng)
            if blind:
                tokens, given = dialogue.opening + tokens, given + len(dialogue.opening)
            if len(row) + len(tokens) > length:
                if blind:
                    break
                continue
            number += 1
            first = 0 if blind else prefix
            for j in range(given, len(tokens)):
                targets.append(Target(index, len(row) + j - 1, tokens[j], len(asked)))
            asked.append(question)
            row += [(token, first + j, number, blind) for j, token in enumerate(tokens)]
        rows.append(row)
    longest = max(map(len, rows))
    padding = (0, 0, 0, True)
    columns = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    ids, positions, blocks, blind_column = columns.unbind(-1)
    return Rows(ids, positions, blocks, blind_column.bool(), tuple(targets), tuple(asked))
