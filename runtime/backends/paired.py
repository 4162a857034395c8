"""Two engines that share the work of one decoder: OpenVINO runs the chunks of a prompt, ONNX Runtime single tokens.

Where a processor has INT8 dot products the first is the faster at chunks and the second at single tokens. Both hold the
weights, and both a KV cache: after each chunk the new positions are copied to ONNX Runtime's, which alone is complete.
OpenVINO's has the first `_common` positions, and the rest once a chunk needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import LogitsWanted, Piece
from phisight.backends.openvino import OpenVinoDecoder
from phisight.backends.ort import OrtDecoder

__all__ = ["LEAST_CHUNK", "PairedDecoder"]

LEAST_CHUNK = 64
"""Positions from which on OpenVINO is the faster, and that pays for copying what it lacks (`bench/chunk_sizes.py`)."""


class PairedDecoder:
    """A decoder whose weights are in memory twice."""

    def __init__(self, chunks: OpenVinoDecoder, steps: OrtDecoder) -> None:
        """Both of one directory's decoder.onnx, with a float32 KV cache in the CPU's memory."""
        self._chunks = chunks
        self._steps = steps
        self._common = 0

    @property
    def hidden_size(self) -> int:
        return self._steps.hidden_size

    @property
    def vocab_size(self) -> int:
        return self._steps.vocab_size

    @property
    def length(self) -> int:
        return self._steps.length

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position takes in a saved state; at most twice as many in memory."""
        return self._steps.kv_bytes_per_token

    @property
    def bidirectional(self) -> bool:
        """What is not causal goes to OpenVINO, whose mask is ours."""
        return self._chunks.bidirectional

    def reserve(self, capacity: int, largest_image: int = 0) -> None:
        """See `OrtDecoder.reserve`. Raises EngineError."""
        self._steps.reserve(capacity, largest_image)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self._steps.truncate(length)
        self._common = min(self._common, length)

    def append(
        self, pieces: Sequence[Piece], logits: LogitsWanted = "last", *, causal: bool = True
    ) -> NDArray[np.float32]:
        """See `phisight.backends.base.Decoder.append`. Raises EngineError, after which nothing is cached."""
        try:
            count, length = sum(len(piece) for piece in pieces), self._steps.length
            if causal and count < LEAST_CHUNK:
                return self._steps.append(pieces, logits)
            self._chunks.truncate(self._common)
            if self._common < length:
                self._chunks.replace(self._steps.cached())
            rows = self._chunks.append(pieces, logits, causal=causal)
            self._steps.put(count, self._chunks.cached(length))
            self._common = self._steps.length
        except BaseException:
            self.truncate(0)
            raise
        return rows

    def state_save(self) -> bytes:
        """See `OrtDecoder.state_save`."""
        return self._steps.state_save()

    def state_load(self, state: bytes | memoryview) -> None:
        """See `OrtDecoder.state_load`. Raises InputError."""
        self._steps.state_load(state)
        self._common = 0

    def fork(self) -> PairedDecoder:
        """Another decoder of the same weights, with an empty cache."""
        return PairedDecoder(self._chunks.fork(), self._steps.fork())
