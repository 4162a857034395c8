"""How a tensor is stored: the schemes, their sizes in bytes, and their names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["SCHEMES", "SIZES", "BlockScheme", "BlockSize", "ChannelScheme", "FloatScheme", "FloatType", "Scheme"]

FloatType = Literal["f32", "f16"]
BlockSize = Literal[32, 64, 128]


@dataclass(frozen=True)
class FloatScheme:
    """Plain floating point."""

    dtype: FloatType

    @property
    def label(self) -> str:
        return self.dtype

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        size = 1
        for side in shape:
            size *= side
        return size * (4 if self.dtype == "f32" else 2)


@dataclass(frozen=True)
class BlockScheme:
    """Blocks of `block_size` weights along a row, one float16 scale each; asymmetric ones also have a zero point.

    Asymmetric blocks exist in ONNX alone: GGUF's Q4_1 stores a float16 minimum in place of an integer zero point.
    A row that is not a multiple of the block is padded with zeros, which cost their bytes and change nothing.
    """

    bits: Literal[4, 8]
    block_size: BlockSize
    symmetric: bool = True

    @property
    def label(self) -> str:
        return f"int{self.bits} block {self.block_size}{'' if self.symmetric else ' asymmetric'}"

    @property
    def lowest(self) -> int:
        """The smallest integer of a weight."""
        return -127 if self.symmetric and self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer of a weight."""
        return (1 << (self.bits - 1)) - 1

    def blocks_per_row(self, columns: int) -> int:
        return -(-columns // self.block_size)

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        rows, columns = shape
        count = self.blocks_per_row(columns)
        zero_points = 0 if self.symmetric else -(-count * self.bits // 8)
        return rows * (count * (self.block_size * self.bits // 8 + 2) + zero_points)


@dataclass(frozen=True)
class ChannelScheme:
    """INT8 weights with one float32 scale per output channel, for integer products with INT8 activations."""

    @property
    def label(self) -> str:
        return "int8 channel"

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        rows, columns = shape
        return rows * (columns + 4)


Scheme: TypeAlias = FloatScheme | BlockScheme | ChannelScheme
SIZES: tuple[BlockSize, ...] = (32, 64, 128)
WRITABLE: tuple[Scheme, ...] = (
    *(BlockScheme(4, size) for size in SIZES),
    *(BlockScheme(4, size, symmetric=False) for size in SIZES),
    *(BlockScheme(8, size) for size in SIZES),
    ChannelScheme(),
    FloatScheme("f16"),
    FloatScheme("f32"),
)

SCHEMES: dict[str, Scheme] = {scheme.label: scheme for scheme in WRITABLE}
"""All that an export can write, by label."""
