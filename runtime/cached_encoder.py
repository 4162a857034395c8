"""The vision encoder behind what it encoded before: in memory, and on disk where a model keeps pictures there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import VisionEncoder
from phisight.cached_decoder import Cancel
from phisight.errors import Cancelled, ImageError
from phisight.model_cache import ModelCache
from phisight.naflex import Patches
from phisight.sequence import ImageFeatures

__all__ = ["TEXT_ONLY", "CachedEncoder", "StageProgress"]

StageProgress: TypeAlias = Callable[[Literal["encode", "prefill"], int, int], None]
"""Called with the stage, how much of it is done and how much there is: images, or positions."""

TEXT_ONLY = (
    "this model cannot take images: it was made of a text-only checkpoint, or is a GGUF file opened without its mmproj"
)

FEATURE_CACHE_BYTES = 512 << 20
"""Image features kept for further questions: a 3600-token image of the 15B model takes 70 MiB."""


class CachedEncoder:
    """Patches -> image tokens; `encoder` is None for a model that takes text alone. `store` keeps them on disk, too."""

    store: ModelCache | None = None

    def __init__(self, encoder: VisionEncoder | None, hidden_size: int) -> None:
        self.engine = encoder
        self._hidden_size = hidden_size
        self._features: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Memory of the image tokens that are kept."""
        return sum(features.nbytes for features in tuple(self._features.values()))

    def holds(self, patches: Patches) -> bool:
        """Whether the same pixels were encoded before and are in memory."""
        return patches.digest in self._features

    def encode(self, patches: Patches) -> NDArray[np.float32]:
        """Patches -> image tokens (tokens, hidden) float32. Raises ImageError for a text-only model, EngineError."""
        if self.engine is None:
            raise ImageError(TEXT_ONLY)
        features = self._features.pop(patches.digest, None)
        if features is None and self.store is not None:
            features = self.store.features(patches.digest, self._hidden_size)
        if features is None:
            started = perf_counter()
            features = self.engine.encode(patches)
            if self.store is not None:
                self.store.keep_features(patches.digest, features, perf_counter() - started)
        self._features[patches.digest] = features
        while len(self._features) > 1 and self.held_bytes > FEATURE_CACHE_BYTES:
            self._features.popitem(last=False)
        return features

    def encode_all(
        self,
        images: Sequence[Patches | ImageFeatures],
        progress: StageProgress | None = None,
        cancel: Cancel | None = None,
    ) -> list[ImageFeatures]:
        """Images in their order; features, perhaps of another model, are taken as they are.

        Raises ImageError for a text-only model, EngineError, and Cancelled between two images.
        """
        features = []
        for number, image in enumerate(images):
            if cancel is not None and cancel():
                raise Cancelled(f"cancelled after {number} of {len(images)} images")
            if progress is not None:
                progress("encode", number, len(images))
            if not isinstance(image, ImageFeatures):
                image = ImageFeatures(image.digest, self.encode(image))
            features.append(image)
        if progress is not None and images:
            progress("encode", len(images), len(images))
        return features
