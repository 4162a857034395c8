"""What a checkpoint is calibrated with: token ids with slots for pictures, and a record of where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.naflex import Patches
from phisight.sequence import IMAGE_SLOT

__all__ = ["CalibrationData", "CalibrationSequence", "SourceCount"]


@dataclass(frozen=True)
class CalibrationSequence:
    """One sequence that the decoder reads from its start. `ids` hold IMAGE_SLOT for each of `images`, in order."""

    source: str
    ids: tuple[int, ...]
    images: tuple[Patches, ...] = ()

    @property
    def image_tokens(self) -> int:
        return sum(image.num_patches for image in self.images)

    @property
    def text_tokens(self) -> int:
        return len(self.ids) - len(self.images)

    def __len__(self) -> int:
        """Positions after splicing."""
        return self.text_tokens + self.image_tokens

    def is_image(self) -> NDArray[np.bool_]:
        """Whether each position is an image token, (positions,)."""
        images = iter(self.images)
        lengths = [next(images).num_patches if id_ == IMAGE_SLOT else 1 for id_ in self.ids]
        return np.repeat(np.array(self.ids) == IMAGE_SLOT, lengths)


@dataclass(frozen=True)
class SourceCount:
    """What one source contributed."""

    name: str
    sequences: int
    pictures: int
    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class CalibrationData:
    """All sequences, in the order in which they are read."""

    sequences: tuple[CalibrationSequence, ...]

    @property
    def positions(self) -> int:
        return sum(map(len, self.sequences))

    @cached_property
    def sources(self) -> tuple[SourceCount, ...]:
        """By source, in order of appearance."""
        found: dict[str, list[CalibrationSequence]] = {}
        for sequence in self.sequences:
            found.setdefault(sequence.source, []).append(sequence)
        return tuple(_count(name, group) for name, group in found.items())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids and pictures, hex: equal digests mean equal statistics."""
        state = hashlib.sha256()
        for sequence in self.sequences:
            state.update(len(sequence.ids).to_bytes(8, "little"))
            state.update(np.array(sequence.ids, "<i8").tobytes())
            for image in sequence.images:
                state.update(image.digest)
        return state.hexdigest()

    def as_json(self) -> dict[str, Any]:
        """For the manifest: digest, totals, and each source's share."""
        total = _count("all", self.sequences)
        return {
            "sha256": self.digest,
            "sequences": total.sequences,
            "pictures": total.pictures,
            "text_tokens": total.text_tokens,
            "image_tokens": total.image_tokens,
            "sources": [asdict(source) for source in self.sources],
        }


def _count(name: str, sequences: Iterable[CalibrationSequence]) -> SourceCount:
    group = list(sequences)
    return SourceCount(
        name,
        len(group),
        sum(len(sequence.images) for sequence in group),
        sum(sequence.text_tokens for sequence in group),
        sum(sequence.image_tokens for sequence in group),
    )
