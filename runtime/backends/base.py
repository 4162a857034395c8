"""What the runtime asks of an engine: two protocols.

Sequences are appended to one KV cache per decoder; `truncate` drops the tail, so that a common prefix is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from phisight.naflex import Patches

__all__ = ["Decoder", "ForkableDecoder", "LogitsWanted", "Piece", "SavableDecoder", "VisionEncoder"]

Piece = NDArray[np.int32] | NDArray[np.float32]
"""A stretch of the sequence: token ids, shape (n,) int32, or image features, shape (n, hidden) float32."""

LogitsWanted = Literal["last", "all"]


class VisionEncoder(Protocol):
    """Vision tower and projector."""

    @property
    def hidden_size(self) -> int:
        """Width of an image token, which is the decoder's."""

    def encode(self, patches: Patches) -> NDArray[np.float32]:
        """Image patches -> image tokens, (num_patches, hidden_size) float32."""


class Decoder(Protocol):
    """The language model with its KV cache."""

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""

    @property
    def vocab_size(self) -> int:
        """Number of logits per position."""

    @property
    def length(self) -> int:
        """Positions now in the KV cache."""

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        """Make room for `capacity` positions in all; what is cached stays. Never shrinks.

        `largest_image` is the most positions that will be run as one chunk that is not causal; it is also made sure
        that there is room to work on them, as far as the engine can tell.
        """

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        """Run the pieces, in order, behind what is cached, as one chunk.

        Each position sees those before it and itself or, unless `causal`, all that is cached and all of the chunk.
        Returns logits, float32: (1, vocab) of the last position, or (n, vocab) of every new one. The array may be a
        view of a buffer that the next call overwrites.
        """


@runtime_checkable
class ForkableDecoder(Decoder, Protocol):
    """A decoder that can have several KV caches."""

    def fork(self) -> Decoder:
        """Another decoder of the same weights, which are in memory once, with an empty KV cache."""


@runtime_checkable
class SavableDecoder(Decoder, Protocol):
    """A decoder whose KV cache can be kept for another process that has opened the same model in the same way."""

    def state_save(self) -> bytes:
        """What is cached."""

    def state_load(self, state: bytes | memoryview) -> None:
        """Replace what is cached by a saved state.

        Raises InputError for one that does not fit, EngineError if the engine refuses it: then nothing is cached.
        """
