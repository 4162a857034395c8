"""Prefill in chunks: where a sequence is cut, and which chunks see all of themselves.

    causal          every position sees itself and those before it; a chunk holds text and images as they come
    bidirectional   the tokens of one image see each other too: an image is one chunk, text before and behind it others

The reference's code is causal. The model's card says that attention within an image goes both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from phisight.config import DecoderConfig
from phisight.errors import InputError
from phisight.sequence import InputSequence

__all__ = ["ImageAttention", "PrefillChunk", "check_image_attention", "chunk_bytes", "plan_chunks", "reusable"]

ImageAttention = Literal["causal", "bidirectional"]


@dataclass(frozen=True)
class PrefillChunk:
    """Positions from `start` to before `stop`, run at once. Unless `causal` they all see each other."""

    start: int
    stop: int
    causal: bool = True

    def __len__(self) -> int:
        return self.stop - self.start


def check_image_attention(value: object) -> None:
    """Raises InputError for another value than those of ImageAttention."""
    if value not in get_args(ImageAttention):
        raise InputError(f"image_attention is {value!r}, wanted one of {', '.join(get_args(ImageAttention))}")


def plan_chunks(
    sequence: InputSequence, start: int, size: int, attention: ImageAttention, cuts: tuple[int, ...] = ()
) -> list[PrefillChunk]:
    """Chunks of at most `size` positions for those from `start` on; an image that is one chunk may be longer.

    At each of `cuts`, which do not lie inside such an image, a chunk ends, and the next ones are counted from there.

    Raises ValueError for a `start` inside such an image: take one that `reusable` allows.
    """
    images = sequence.images if attention == "bidirectional" else ()
    chunks = []
    for first, stop in sorted((*images, *((cut, cut) for cut in cuts), (len(sequence), len(sequence)))):
        if stop <= start:
            continue
        if first < start:
            raise ValueError(f"position {start} lies inside the image from {first} to {stop}, which is one chunk")
        chunks += [PrefillChunk(at, min(at + size, first)) for at in range(start, first, size)]
        if first < stop:
            chunks.append(PrefillChunk(first, stop, causal=False))
        start = stop
    return chunks


def reusable(sequence: InputSequence, prefix: int, attention: ImageAttention) -> int:
    """How many of the first `prefix` positions may stay cached: an image that is one chunk is run whole or not."""
    if attention == "bidirectional":
        for first, stop in sequence.images:
            if first < prefix < stop:
                return first
    return prefix


def chunk_bytes(config: DecoderConfig, positions: int, *, whole_scores: bool = False) -> int:
    """About how many bytes a float32 graph needs for a moment to run so many positions as one chunk.

    The widest place is the feed-forward layer: its two halves, packed and apart, and their product. With ONNX Runtime
    the real widths' 3600 tokens took 1655 MiB, of which this makes 1758; attention goes tile by tile there. llama.cpp
    makes fewer copies but, unless its KV cache is quantised, holds the scores of all heads at once: `whole_scores`.
    """
    wide = 3 * config.intermediate_size + 2 * config.hidden_size
    return 4 * positions * (wide + (positions * config.num_heads if whole_scores else wide))
