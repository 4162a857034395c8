"""The embedding table of a model directory, mapped from disk: only the rows of the prompt are ever read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.backends.base import Piece
from phisight.errors import ModelDirError

__all__ = ["Embeddings"]

BLOCK = 32
"""Weights that share a scale along a row of an INT8 table."""


class Embeddings:
    """`embeddings.npy`, float32, float16, or INT8 with `embeddings.scales.npy`."""

    def __init__(self, directory: Path, hidden_size: int) -> None:
        """Raises ModelDirError for files that are not what the exporter writes."""
        try:
            self._table = np.load(directory / "embeddings.npy", mmap_mode="r")
            quantized = self._table.dtype == np.int8
            self._scales = np.load(directory / "embeddings.scales.npy", mmap_mode="r") if quantized else None
        except (OSError, ValueError) as error:
            raise ModelDirError(f"the embeddings in {directory} cannot be read ({error}): export again") from None
        if self._table.ndim != 2 or self._table.shape[1] != hidden_size:
            raise ModelDirError(
                f"{directory / 'embeddings.npy'} has shape {self._table.shape}, wanted (vocabulary, {hidden_size}): "
                "export again"
            )

    def lookup(self, ids: Piece, out: NDArray[np.float32]) -> None:
        """Write the rows of `ids` (n,) into `out` (n, hidden) float32."""
        out[...] = self._table[ids]
        if self._scales is not None:
            scales = np.repeat(self._scales[ids].astype(np.float32), BLOCK, axis=1)
            out *= scales[:, : out.shape[1]]
