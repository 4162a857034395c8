"""What a method made of a checkpoint's weights, kept on disk from their calibration to the writing of files.

NAME.packed.npy    (rows, blocks, bytes) uint8, as MatMulNBits has them
NAME.scale.npy     (rows, blocks) float16
NAME.vector.npy    (width,) float32: a norm's weight that took up the scales of the layer behind it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.quant.blocks import Blocks
from phisight.quant.packing import pack_matmul_nbits, unpack_matmul_nbits
from phisight.quant.scheme import BlockScheme

__all__ = ["QuantizedWeights"]

ROWS_AT_ONCE = 1024


class QuantizedWeights:
    """A folder of quantised weights by their names in the checkpoint. Weights that are not there are rounded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, name: str, shape: tuple[int, ...], scheme: BlockScheme, parts: Iterable[Blocks]) -> None:
        """Write the rows of a weight (rows, columns) as they come, in place of what an earlier run wrote."""
        rows, count = shape[0], scheme.blocks_per_row(shape[1])
        packed = self._new(name, "packed", (rows, count, scheme.block_size * scheme.bits // 8), np.uint8)
        scales = self._new(name, "scale", (rows, count), np.float16)
        at = 0
        for blocks in parts:
            stop = at + len(blocks.q)
            packed[at:stop] = pack_matmul_nbits(blocks.q, scheme.bits)
            scales[at:stop] = blocks.scale
            at = stop
        packed.flush()
        scales.flush()

    def keep_vector(self, name: str, values: NDArray[np.float32]) -> None:
        self._folder.mkdir(exist_ok=True)
        np.save(self._path(name, "vector"), values)

    def __contains__(self, name: str) -> bool:
        return self._path(name, "scale").is_file()

    def packed(self, name: str) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float16]]]:
        """Rows of a weight, some at a time, as MatMulNBits has them, and their scales."""
        packed = np.load(self._path(name, "packed"), mmap_mode="r")
        scales = np.load(self._path(name, "scale"), mmap_mode="r")
        for start in range(0, len(packed), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            yield np.array(packed[rows]), np.array(scales[rows])

    def blocks(self, name: str, columns: int, scheme: BlockScheme) -> Iterator[Blocks]:
        """The same as blocks."""
        for packed, scale in self.packed(name):
            yield Blocks(unpack_matmul_nbits(packed, scheme.bits), scale, columns)

    def vector(self, name: str) -> NDArray[np.float32] | None:
        """A vector that differs from the checkpoint's, or None."""
        path = self._path(name, "vector")
        if not path.is_file():
            return None
        values: NDArray[np.float32] = np.load(path)
        return values

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{name}.{kind}.npy"

    def _new(
        self, name: str, kind: str, shape: tuple[int, ...], dtype: type[np.generic]
    ) -> np.memmap[tuple[int, ...], np.dtype[np.generic]]:
        self._folder.mkdir(exist_ok=True)
        return np.lib.format.open_memmap(self._path(name, kind), "w+", np.dtype(dtype), shape)
