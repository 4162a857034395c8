"""A sequence in which one stage's outcome is another model's: image features, or the rows of the embedding table.

Layers, head and KV cache lie inside one graph of the engine and cannot be told apart here; export the model with one of
them quantised (`phisight export --plan`) and compare that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phisight.backends.embeddings import Embeddings
from phisight.model import Model
from phisight.naflex import Patches
from phisight.sequence import IMAGE_SLOT, ImageFeatures

__all__ = ["features_of", "with_embeddings", "with_features"]


def features_of(model: Model, patches: Sequence[Patches]) -> dict[str, NDArray[np.float32]]:
    """The image tokens of each picture, (tokens, hidden) float32, by a name that keeps their order."""
    return {f"features-{number}": model.encode_image(image) for number, image in enumerate(patches)}


def with_features(ids: Sequence[int], features: Sequence[NDArray[np.float32]]) -> tuple[list[int], list[ImageFeatures]]:
    """Ids with slots, and image features for them instead of pictures."""
    return list(ids), [_features(rows) for rows in features]


def with_embeddings(
    ids: Sequence[int], images: Sequence[ImageFeatures], table: Embeddings
) -> tuple[list[int], list[ImageFeatures]]:
    """The whole sequence as if it were one picture: rows of `table` for the tokens, and the features between them."""
    pieces: list[NDArray[np.float32]] = []
    remaining = iter(images)
    cuts = np.flatnonzero(np.array(ids) == IMAGE_SLOT)
    for number, text in enumerate(np.split(np.array(ids, np.int32), cuts)):
        if number:
            pieces.append(next(remaining).features)
            text = text[1:]
        rows = np.empty((len(text), table.columns), np.float32)
        table.lookup(text, rows)
        pieces.append(rows)
    return [IMAGE_SLOT], [_features(np.concatenate(pieces))]


def _features(rows: NDArray[np.float32]) -> ImageFeatures:
    held = np.ascontiguousarray(rows)
    return ImageFeatures(hashlib.sha256(held.data).digest(), held)
