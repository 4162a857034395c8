"""Several KV caches of one model, so that conversations that take turns do not overwrite each other's.

A request goes to the slot that has most of its beginning; where that would throw away more than it saves, to the one
that was not used for longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phisight.cached_decoder import CachedDecoder, Cancel, Progress
from phisight.sequence import InputSequence, Keys, common_prefix

__all__ = ["DecoderSlots"]

# What a position in the cache of the slot used last is worth, against one that need not be run now.
_KEPT = 0.25


class DecoderSlots(CachedDecoder):
    """A CachedDecoder that is really one of several, chosen anew by each prefill and score.

    Each slot takes memory as its sequences need it, up to the whole context.
    """

    def __init__(self, slots: Sequence[CachedDecoder]) -> None:
        """The slots are decoders of the same weights (`CachedDecoder.twin`), at least one."""
        self._slots = list(slots)  # the one used last at the end
        first = self._slots[0]
        self.context = first.context
        self.image_attention = first.image_attention
        self.store = first.store

    @property
    def vocab_size(self) -> int:
        return self._used.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._used.hidden_size

    @property
    def keys(self) -> Keys:
        return self._used.keys

    @property
    def held(self) -> int:
        return sum(slot.held for slot in self._slots)

    @property
    def requests(self) -> int:
        return sum(slot.requests for slot in self._slots)

    @property
    def _used(self) -> CachedDecoder:
        return self._slots[-1]

    def twin(self) -> CachedDecoder:
        return self._used.twin()

    def forget(self) -> None:
        for slot in self._slots:
            slot.forget()

    def prefill(
        self,
        sequence: InputSequence,
        *,
        chunk: int,
        room: int = 0,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32]:
        self._choose(sequence)
        return self._used.prefill(sequence, chunk=chunk, room=room, progress=progress, cancel=cancel)

    def steps(self, token_ids: Sequence[int], *, most: int) -> NDArray[np.float32]:
        return self._used.steps(token_ids, most=most)

    def retract(self, count: int) -> None:
        self._used.retract(count)

    def score(
        self,
        sequence: InputSequence,
        *,
        chunk: int,
        last: int | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32]:
        return self._used.score(sequence, chunk=chunk, last=last, progress=progress, cancel=cancel)

    def _choose(self, sequence: InputSequence) -> None:
        """Put the best slot for this sequence at the end."""
        newest = max(len(self._slots) - 1, 1)

        def gain(rank: int) -> float:
            keys = self._slots[rank].keys
            common = common_prefix(keys, sequence.keys)
            return common - (len(keys) - common) * _KEPT * rank / newest

        best = max(range(len(self._slots)), key=gain)  # of equals the one that waited longest
        self._slots.append(self._slots.pop(best))
