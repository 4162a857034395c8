"""How likely the model found the tokens of an answer: natural logarithms of their probabilities.

They are the model's own, from its logits as they come: at temperature 1, before the repetition penalty, the filters and
a constraint. So they say what the model thinks, not how the token was drawn; a token that a constraint forced may have
a very small one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_ALTERNATIVES", "ShownTokens", "TokenLogprob", "TokenLogprobs", "token_logprobs"]

MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The token that was drawn, and the likeliest tokens at its place, the likeliest first; of equals the lower id."""

    drawn: TokenLogprob
    likeliest: tuple[TokenLogprob, ...]


def token_logprobs(logits: NDArray[np.float32], token_id: int, count: int) -> TokenLogprobs:
    """Logits, (drawable,) float32 and finite -> those of the token that was drawn and of the `count` likeliest."""
    values = logits.astype(np.float64)
    top = values.max()
    values -= top + np.log(np.exp(values - top).sum())
    count = min(count, len(values))
    ids: NDArray[np.int64] = np.empty(0, np.int64)
    if count:
        floor = np.partition(values, -count)[-count]
        ids = np.flatnonzero(values >= floor)  # ascending, so that a stable sort puts the lower id first
        ids = ids[np.argsort(-values[ids], kind="stable")[:count]]
    return TokenLogprobs(
        TokenLogprob(token_id, float(values[token_id])),
        tuple(TokenLogprob(int(id_), float(values[id_])) for id_ in ids),
    )


class ShownTokens:
    """Tokens of an answer wait here until the text that they begin is shown: what a stop text cuts off is not told."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, TokenLogprobs]] = deque()  # with the place in the text where each begins
        self._decoded = 0
        self._shown = 0

    def push(self, text: str, logprobs: TokenLogprobs | None) -> None:
        """Characters, and the token that completes them; None where there is none, or nobody asked for it."""
        if logprobs is not None:
            self._waiting.append((self._decoded, logprobs))
        self._decoded += len(text)

    def pop(self, text: str) -> tuple[TokenLogprobs, ...]:
        """The tokens that begin in characters that are shown now."""
        self._shown += len(text)
        return tuple(self._begun())

    def _begun(self) -> Iterator[TokenLogprobs]:
        while self._waiting and self._waiting[0][0] < self._shown:
            yield self._waiting.popleft()[1]
