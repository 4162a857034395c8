"""The logits behind each token of an answer: tokens that were guessed are run together with the one before them.

A guess is kept if the very token is drawn from the logits before it, else it is taken back with all behind it. For a
draft that is certain of its tokens this is the rejection rule of speculative sampling: token x is kept with its
probability p(x), and otherwise another one is drawn from what p leaves without x. So the answer is distributed as
without drafts, and since the sampler draws once for each token, in order, the same seed gives the same answer, as far
as the engine computes the same logits for one row and for several. Constraints and budgets see every token in its turn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phisight.cached_decoder import CachedDecoder
from phisight.errors import EngineError
from phisight.prompt_lookup import PromptLookup

__all__ = ["DraftedSteps"]


class DraftedSteps:
    """Runs the tokens of one answer behind a prefill; `lookup` None runs each alone."""

    def __init__(self, decoder: CachedDecoder, lookup: PromptLookup | None, positions: int) -> None:
        """`positions`: those of prompt and answer together, at most."""
        self._decoder = decoder
        self._lookup = lookup
        self._positions = positions
        self._request = decoder.requests
        self._open: list[int] = []  # guesses that were run and not yet judged
        self._rows: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self.drafted = 0
        self.accepted = 0

    def logits(self, token_id: int, left: int) -> NDArray[np.float32]:
        """Logits behind a token that was drawn, (vocab,) float32, valid until the next call.

        `left`: tokens of the answer that may be drawn still. Raises EngineError, also when another request has begun
        on the decoder.
        """
        if self._decoder.requests != self._request:
            raise EngineError(
                "another request has begun on this decoder: finish one answer before the next, or load twice"
            )
        if self._lookup is not None:
            self._lookup.observe(token_id)
        if self._open and self._open[0] == token_id:
            del self._open[0]
            self.accepted += 1
        else:
            self._take_back()
            drafted = [] if self._lookup is None else self._lookup.draft(left - 1)
            self._rows = self._decoder.steps([token_id, *drafted], most=self._positions)
            self._open = drafted
            self.drafted += len(drafted)
        row: NDArray[np.float32] = self._rows[-1 - len(self._open)]
        return row

    def close(self) -> None:
        """Take back the guesses that were not judged, unless the decoder went on to another request."""
        if self._decoder.requests == self._request:
            self._take_back()

    def _take_back(self) -> None:
        if self._open:
            count, self._open = len(self._open), []
            self._decoder.retract(count)
