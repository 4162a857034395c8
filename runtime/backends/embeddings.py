"""The embedding table of a model directory, read row by row: only the rows of the prompt are ever touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        self._table = _Rows(directory / "embeddings.npy")
        if self._table.columns != hidden_size:
            raise ModelDirError(
                f"{self._table.path} has rows of {self._table.columns}, wanted {hidden_size}: export again"
            )
        quantized = self._table.dtype == np.int8
        self._scales = _Rows(directory / "embeddings.scales.npy") if quantized else None

    @property
    def columns(self) -> int:
        """Width of a row."""
        return int(self._table.columns)

    def fill(self, pieces: Sequence[Piece], out: NDArray[np.float32]) -> None:
        """Write the pieces, in order, into `out` (n, hidden) float32: rows of token ids, image features as they are."""
        at = 0
        for piece in pieces:
            place = out[at : at + len(piece)]
            if piece.ndim == 1:
                self.lookup(piece, place)
            else:
                place[...] = piece
            at += len(piece)

    def lookup(self, ids: Piece, out: NDArray[np.float32]) -> None:
        """Write the rows of `ids` (n,) int32 into `out` (n, hidden) float32."""
        out[...] = self._table.read(ids)
        if self._scales is not None:
            scales = np.repeat(self._scales.read(ids).astype(np.float32), BLOCK, axis=1)
            out *= scales[:, : out.shape[1]]


class _Rows:
    """Rows of a two-dimensional .npy file.

    They are read, not mapped: on a file that is not in memory a page fault costs a hundred times a read of one row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mapped: NDArray[Any] = np.load(path, mmap_mode="r")
            self.count, self.columns = mapped.shape
            self.dtype = mapped.dtype
            self._first = int(getattr(mapped, "offset", 0))
            self._file = path.open("rb", buffering=0)
        except (OSError, ValueError) as error:
            raise ModelDirError(f"{path} cannot be read ({error}): export again") from None

    def read(self, ids: Piece) -> NDArray[Any]:
        """(n,) -> (n, columns). Raises ModelDirError if the file has changed under us."""
        rows = np.empty((len(ids), self.columns), self.dtype)
        size = self.columns * self.dtype.itemsize
        for place, row in zip(rows, ids.tolist(), strict=True):
            self._file.seek(self._first + int(row) * size)
            if self._file.readinto(place.data) != size:
                raise ModelDirError(f"{self.path} ends before row {row}: export or copy the model again")
        return rows
