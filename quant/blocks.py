"""Quantised blocks: the one intermediate form that every file format is written from.

A block is `block_size` consecutive weights of a row with one scale: `w = q * scale`, q a small signed integer. For
blocks of 32 these are the numbers of GGUF's Q4_0 and Q8_0 and of ONNX Runtime's MatMulNBits without zero points. An
asymmetric block also has a zero point, `w = (q - zero) * scale`, which only MatMulNBits can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phisight.errors import CheckpointError
from phisight.quant.scheme import BlockScheme

__all__ = [
    "Blocks",
    "Channels",
    "dequantize_blocks",
    "dequantize_channels",
    "quantize_blocks",
    "quantize_channels",
    "round_blocks",
    "split_blocks",
    "to_scale",
]

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Blocks:
    """Quantised rows: `q` (rows, blocks, block_size) int8, `scale` (rows, blocks) float16, `columns` before padding.

    q lies in [-8, 7] for 4 bits and in [-127, 127] for 8. `zero` (rows, blocks) int8, or None for symmetric blocks,
    counts like q, from -8 or -128; asymmetric blocks of 8 bits also use -128.
    """

    q: NDArray[np.int8]
    scale: NDArray[np.float16]
    columns: int
    zero: NDArray[np.int8] | None = None

    def part(self, rows: slice, blocks: slice = slice(None)) -> Blocks:
        """Some of the rows, and of their blocks, as a view."""
        zero = None if self.zero is None else self.zero[rows, blocks]
        start, stop, _ = blocks.indices(self.q.shape[1])
        columns = min(stop * self.q.shape[2], self.columns) - start * self.q.shape[2]
        return Blocks(self.q[rows, blocks], self.scale[rows, blocks], columns, zero)

    def replace(self, chosen: NDArray[np.bool_], other: Blocks) -> None:
        """Overwrite chosen blocks, or whole rows, by those of `other`: (rows, blocks) or (rows,) bool."""
        self.q[chosen] = other.q[chosen]
        self.scale[chosen] = other.scale[chosen]
        if self.zero is not None and other.zero is not None:
            self.zero[chosen] = other.zero[chosen]


@dataclass(frozen=True)
class Channels:
    """Rows with one scale each: `q` (rows, columns) int8 in [-127, 127], `scale` (rows,) float32."""

    q: NDArray[np.int8]
    scale: NDArray[np.float32]


def quantize_blocks(weights: NDArray[np.float32], scheme: BlockScheme) -> Blocks:
    """Round to nearest. (rows, columns) float32 -> blocks.

    4 bits: the weight of largest magnitude, with its sign, becomes -8, so that all 16 levels are in use (as in GGUF's
    Q4_0). 8 bits: the largest magnitude becomes 127 (as in Q8_0). Asymmetric: the levels span the weights and zero,
    which stays exact. The scale is rounded to float16 first and the weights are rounded against the rounded scale.

    Raises CheckpointError for weights that are not finite or too large for a float16 scale.
    """
    blocks = split_blocks(weights, scheme)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    zero = None
    if not scheme.symmetric:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        levels = np.float32(scheme.highest - scheme.lowest)
        scale = to_scale(high / levels - low / levels, weights)
        steps = np.rint(low * _inverse(scale))  # from zero down to the lowest weight
        zero = (scheme.lowest - np.maximum(steps, scheme.lowest - scheme.highest)).astype(np.int8)
    elif scheme.bits == 4:
        scale = to_scale(np.where(high > -low, high, low) / np.float32(-8), weights)
    else:
        scale = to_scale(np.maximum(high, -low) / np.float32(127), weights)
    return Blocks(round_blocks(blocks, scale, zero, scheme), scale, weights.shape[1], zero)


def split_blocks(weights: NDArray[np.float32], scheme: BlockScheme) -> NDArray[np.float32]:
    """(rows, columns) -> (rows, blocks, block_size), the last block filled up with zeros."""
    rows, columns = weights.shape
    count = scheme.blocks_per_row(columns)
    if count * scheme.block_size != columns:
        padded = np.zeros((rows, count * scheme.block_size), np.float32)
        padded[:, :columns] = weights
        weights = padded
    return weights.reshape(rows, count, scheme.block_size)


def to_scale(scale: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales as they are stored. Raises CheckpointError for scales that float16 cannot hold, naming the weights."""
    if not np.all(np.abs(scale) <= FLOAT16_MAX):  # also catches NaN
        raise CheckpointError(
            f"weights reach {np.abs(weights).max()}, which no float16 scale can hold: the checkpoint is damaged"
        )
    return scale.astype(np.float16)


def round_blocks(
    blocks: NDArray[np.float32], scale: NDArray[np.float16], zero: NDArray[np.int8] | None, scheme: BlockScheme
) -> NDArray[np.int8]:
    """The nearest integers: (rows, blocks, block_size) float32, scale and zero (rows, blocks) -> q of the same shape.

    A block whose scale rounded to zero holds nothing that float16 can express: all of it becomes zero.
    """
    scaled = blocks * _inverse(scale)[..., None]
    np.rint(scaled, out=scaled)
    if zero is not None:
        scaled += zero[..., None]
    np.clip(scaled, scheme.lowest, scheme.highest, out=scaled)
    return scaled.astype(np.int8)


def dequantize_blocks(blocks: Blocks) -> NDArray[np.float32]:
    """The inverse of `quantize_blocks`, up to its rounding: (rows, columns) float32."""
    weights = blocks.q.astype(np.float32)
    if blocks.zero is not None:
        weights -= blocks.zero[..., None]
    weights *= blocks.scale.astype(np.float32)[..., None]
    return weights.reshape(len(weights), -1)[:, : blocks.columns]


def _inverse(scale: NDArray[np.float16]) -> NDArray[np.float32]:
    used = scale.astype(np.float32)
    return np.divide(np.float32(1), used, out=np.zeros_like(used), where=used != 0)


def quantize_channels(weights: NDArray[np.float32]) -> Channels:
    """Round to nearest with one scale per row. (rows, columns) float32 -> channels. Raises CheckpointError."""
    largest = np.abs(weights).max(axis=1)
    if not np.isfinite(largest).all():
        raise CheckpointError("weights are not finite: the checkpoint is damaged")
    scale = (largest / np.float32(127)).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    q = np.clip(np.rint(weights * inverse[:, None]), -127, 127).astype(np.int8)
    return Channels(q, scale)


def dequantize_channels(channels: Channels) -> NDArray[np.float32]:
    """(rows, columns) float32."""
    return channels.q.astype(np.float32) * channels.scale[:, None]
