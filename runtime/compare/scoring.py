"""One passage and one model: what the reference answers, and how a variant scores that answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.compare.metrics import Positions, positions_of
from phisight.compare.passages import Asking, Passage, Question, Window, ask, to_score
from phisight.compare.workspace import Record
from phisight.model import Model
from phisight.naflex import Patches

__all__ = ["against", "measure", "refer", "unchanged"]


def refer(
    model: Model, passage: Passage, asking: Asking
) -> tuple[dict[str, Any], NDArray[np.float32], tuple[Patches, ...]]:
    """The reference's values, its logits at the positions that count, (positions, vocab), and what it saw."""
    if isinstance(passage, Window):
        ids, targets = to_score(passage)
        return {"ids": ids, "targets": targets}, model.score(ids, (), last=len(targets)), ()
    asked = ask(model, passage, asking)
    ids = (*asked.prompt_ids, *asked.answer_ids)
    logits = model.score(ids, asked.patches, last=len(asked.answer_ids) + 1)
    # Behind the answer's last token the reference finds its end likeliest, or what would have come next.
    end = int(logits[-1, : model.tokenizer.vocab_size].argmax())
    values = {"ids": ids, "targets": (*asked.answer_ids, end), "pixels": _digests(asked.patches)}
    return values | asked.as_json(), logits, asked.patches


def measure(
    model: Model, passage: Passage, right: Record, asking: Asking
) -> tuple[dict[str, Any], Positions, tuple[Patches, ...]]:
    """The variant's values, the positions of the reference's answer, and what the variant saw."""
    values: dict[str, Any] = {}
    patches: tuple[Patches, ...] = ()
    if isinstance(passage, Question):
        asked = ask(model, passage, asking)
        patches = asked.patches
        values = {"pixels": _digests(patches), **asked.as_json()}
    logits = model.score(right.values["ids"], patches, last=len(right.values["targets"]))
    return values, against(right, logits), patches


def against(right: Record, logits: NDArray[np.float32]) -> Positions:
    return positions_of(right.arrays["logits"], logits, right.values["targets"])


def unchanged(reference: NDArray[np.float64]) -> Positions:
    """Positions at which nothing was exchanged."""
    return Positions(np.zeros(len(reference)), np.ones(len(reference), np.bool_), reference, reference)


def _digests(patches: Iterable[Patches]) -> list[str]:
    return [hashlib.sha256(image.digest).hexdigest()[:16] for image in patches]
