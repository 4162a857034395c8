"""What a method made of a checkpoint's weights, kept on disk from their calibration to the writing of files.

NAME.packed.npy    (rows, blocks, bytes) uint8, as MatMulNBits has them
NAME.scale.npy     (rows, blocks) float16
NAME.zero.npy      (rows, bytes) uint8, zero points as MatMulNBits has them, of asymmetric blocks alone
NAME.vector.npy    (width,) float32: a norm's weight that took up the scales of the layer behind it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.quant.blocks import Blocks
from phisight.quant.packing import pack_matmul_nbits, pack_zero_points, unpack_matmul_nbits, unpack_zero_points
from phisight.quant.scheme import BlockScheme

__all__ = ["PackedRows", "QuantizedWeights"]

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PackedRows:
    """Some rows of a weight as MatMulNBits has them: `data` (rows, blocks, bytes), `scale` (rows, blocks) float16.

    `zero` (rows, bytes of a row) has the zero points of asymmetric blocks, None else.
    """

    data: NDArray[np.uint8]
    scale: NDArray[np.float16]
    zero: NDArray[np.uint8] | None

    @classmethod
    def of(cls, blocks: Blocks, bits: int) -> PackedRows:
        zero = None if blocks.zero is None else pack_zero_points(blocks.zero, bits)
        return cls(pack_matmul_nbits(blocks.q, bits), blocks.scale, zero)

    def blocks(self, columns: int, bits: int) -> Blocks:
        """The inverse of `of`."""
        zero = None if self.zero is None else unpack_zero_points(self.zero, bits, self.scale.shape[1])
        return Blocks(unpack_matmul_nbits(self.data, bits), self.scale, columns, zero)


class QuantizedWeights:
    """A folder of quantised weights by their names in the checkpoint. Weights that are not there are rounded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, name: str, shape: tuple[int, ...], scheme: BlockScheme, parts: Iterable[Blocks]) -> None:
        """Write the rows of a weight (rows, columns) as they come, in place of what an earlier run wrote."""
        rows, count = shape[0], scheme.blocks_per_row(shape[1])
        packed = self._new(name, "packed", (rows, count, scheme.block_size * scheme.bits // 8), np.uint8)
        scales = self._new(name, "scale", (rows, count), np.float16)
        zeros = None
        if scheme.symmetric:
            self._path(name, "zero").unlink(missing_ok=True)
        else:
            zeros = self._new(name, "zero", (rows, -(-count * scheme.bits // 8)), np.uint8)
        at = 0
        for blocks in parts:
            rows_of = PackedRows.of(blocks, scheme.bits)
            stop = at + len(blocks.q)
            packed[at:stop] = rows_of.data
            scales[at:stop] = rows_of.scale
            if zeros is not None and rows_of.zero is not None:
                zeros[at:stop] = rows_of.zero
            at = stop
        for array in (packed, scales, zeros):
            if array is not None:
                array.flush()

    def keep_vector(self, name: str, values: NDArray[np.float32]) -> None:
        self._folder.mkdir(exist_ok=True)
        np.save(self._path(name, "vector"), values)

    def __contains__(self, name: str) -> bool:
        return self._path(name, "scale").is_file()

    def packed(self, name: str) -> Iterator[PackedRows]:
        """Rows of a weight, some at a time."""
        packed = np.load(self._path(name, "packed"), mmap_mode="r")
        scales = np.load(self._path(name, "scale"), mmap_mode="r")
        place = self._path(name, "zero")
        zeros = np.load(place, mmap_mode="r") if place.is_file() else None
        for start in range(0, len(packed), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            zero = None if zeros is None else np.array(zeros[rows])
            yield PackedRows(np.array(packed[rows]), np.array(scales[rows]), zero)

    def blocks(self, name: str, columns: int, scheme: BlockScheme) -> Iterator[Blocks]:
        """The same as blocks."""
        for rows in self.packed(name):
            yield rows.blocks(columns, scheme.bits)

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
