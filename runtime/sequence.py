"""Token ids and image features spliced into the one sequence that the decoder reads.

    ids with image slots + image features -> InputSequence: one key and one embedding per position

Keys say what stands at a position, so that two sequences, or a sequence and what is in the KV cache, can be
compared: a token's key is its id, a row of image features has a negative key made of the image's digest and
the row.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phisight.backends.base import Piece
from phisight.errors import PromptError

__all__ = ["IMAGE_SLOT", "ImageFeatures", "InputSequence", "Keys", "common_prefix", "splice"]

IMAGE_SLOT = -200
"""Stands in the ids where the features of an image go (IMAGE_TOKEN_INDEX of the reference)."""

Keys: TypeAlias = NDArray[np.int64]
"""What stands at each position, (positions,) int64: a token id, or a negative key of an image's row."""

# Keys of one image count down from a hash; this is less than all int64 so that its last row has one too.
_IMAGE_KEYS = 2**63 - 2**32


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """The image tokens of one image: digest of its patches, and features (num_patches, hidden) float32."""

    digest: bytes
    features: NDArray[np.float32]

    @property
    def num_patches(self) -> int:
        """Number of image tokens, one per patch."""
        return len(self.features)


@dataclass(frozen=True, eq=False)
class InputSequence:
    """What a request asks the decoder to read. Made by `splice`.

    keys: (positions,) int64.
    stretches: text ids (n,) int32 and image features (n, hidden) float32, in order, none of them empty.
    starts: position at which each stretch begins.
    """

    keys: Keys
    stretches: tuple[Piece, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def text_ids(self) -> Keys:
        """Ids of the text positions, (text tokens,) int64."""
        return self.keys[self.keys >= 0]

    @property
    def images(self) -> tuple[tuple[int, int], ...]:
        """First position of each image and the one behind its last, in order."""
        pairs = zip(self.starts, self.stretches, strict=True)
        return tuple((start, start + len(stretch)) for start, stretch in pairs if stretch.ndim == 2)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The stretches, cut to the positions from `start` to before `stop`: views, nothing is copied.

        Raises ValueError unless 0 <= start <= stop <= positions.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"positions {start} to {stop} are not in a sequence of {len(self)}")
        index = bisect_right(self.starts, start) - 1
        while start < stop:
            stretch, first = self.stretches[index], self.starts[index]
            end = min(first + len(stretch), stop)
            yield stretch[start - first : end - first]
            start, index = end, index + 1


def splice(ids: ArrayLike, images: Sequence[ImageFeatures] = (), *, vocab_size: int, hidden_size: int) -> InputSequence:
    """Token ids, (n,) integers, with IMAGE_SLOT where each image's features go -> sequence.

    Raises PromptError for an empty prompt, ids outside the vocabulary, another number of images than slots,
    or features that are not (1 or more, hidden_size) float32.
    """
    slotted = _checked_ids(ids, vocab_size)
    slots = np.flatnonzero(slotted == IMAGE_SLOT)
    if len(slots) != len(images):
        raise PromptError(
            f"the prompt's image slots number {len(slots)} and its images {len(images)}: give one image for each slot"
        )
    stretches: list[Piece] = []
    keys: list[Keys] = []
    for number, text in enumerate(np.split(slotted, slots)):
        if number > 0:  # np.split leaves each slot at the head of the text behind it
            image = images[number - 1]
            stretches.append(_checked_features(image.features, number, hidden_size))
            keys.append(_image_keys(image.digest, len(image.features)))
            text = text[1:]
        if len(text):
            stretches.append(text.astype(np.int32))
            keys.append(text)
    starts = np.cumsum([0, *map(len, stretches)])[:-1]
    return InputSequence(np.concatenate(keys), tuple(stretches), tuple(starts.tolist()))


def common_prefix(first: Keys, second: Keys) -> int:
    """Number of leading positions with equal keys."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(different[0]) if len(different) else shorter


def _checked_ids(ids: ArrayLike, vocab_size: int) -> Keys:
    array = np.asarray(ids)
    if array.size == 0:
        raise PromptError("the prompt is empty: give at least one token or image")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PromptError(
            f"the token ids are {array.dtype} of shape {array.shape}: give whole numbers in one dimension"
        )
    outside = np.flatnonzero(((array < 0) | (array >= vocab_size)) & (array != IMAGE_SLOT))
    if len(outside):
        raise PromptError(
            f"token id {array[outside[0]]} at place {outside[0]} is not in the vocabulary: "
            f"ids are 0 to {vocab_size - 1}, and {IMAGE_SLOT} for an image"
        )
    return array.astype(np.int64)


def _checked_features(features: NDArray[np.float32], number: int, hidden_size: int) -> NDArray[np.float32]:
    wanted = (max(len(features), 1) if features.ndim else 1, hidden_size)
    if features.dtype != np.float32 or features.shape != wanted:
        raise PromptError(
            f"the features of image {number} are {features.dtype} of shape {features.shape}: "
            f"expected float32 of shape (1 or more, {hidden_size})"
        )
    return features


def _image_keys(digest: bytes, rows: int) -> Keys:
    # Two images share keys only if 63 bits of their hashes agree: about 1 in 10^19 pairs.
    hashed = int.from_bytes(hashlib.blake2b(digest, digest_size=8).digest(), "little")
    return -1 - (hashed % _IMAGE_KEYS) - np.arange(rows, dtype=np.int64)
