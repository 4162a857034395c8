"""Quantised blocks: the one intermediate form that every file format is written from.

A block is `block_size` consecutive weights of a row with one scale: `w = q * scale`, q a small signed integer. For
blocks of 32 these are the numbers of GGUF's Q4_0 and Q8_0 and of ONNX Runtime's MatMulNBits without zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phisight.errors import CheckpointError
from phisight.quant.scheme import BlockScheme

__all__ = ["Blocks", "Channels", "dequantize_blocks", "dequantize_channels", "quantize_blocks", "quantize_channels"]

FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Blocks:
    """Quantised rows: `q` (rows, blocks, block_size) int8, `scale` (rows, blocks) float16, `columns` before padding.

    q lies in [-8, 7] for 4 bits and in [-127, 127] for 8.
    """

    q: NDArray[np.int8]
    scale: NDArray[np.float16]
    columns: int


@dataclass(frozen=True)
class Channels:
    """Rows with one scale each: `q` (rows, columns) int8 in [-127, 127], `scale` (rows,) float32."""

    q: NDArray[np.int8]
    scale: NDArray[np.float32]


def quantize_blocks(weights: NDArray[np.float32], scheme: BlockScheme) -> Blocks:
    """Round to nearest. (rows, columns) float32 -> blocks.

    4 bits: the weight of largest magnitude, with its sign, becomes -8, so that all 16 levels are in use (as in GGUF's
    Q4_0). 8 bits: the largest magnitude becomes 127 (as in Q8_0). The scale is rounded to float16 first and the
    weights are rounded against the rounded scale.

    Raises CheckpointError for weights that are not finite or too large for a float16 scale.
    """
    rows, columns = weights.shape
    count = scheme.blocks_per_row(columns)
    if count * scheme.block_size != columns:
        padded = np.zeros((rows, count * scheme.block_size), np.float32)
        padded[:, :columns] = weights
        weights = padded
    blocks = weights.reshape(rows, count, scheme.block_size)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    if scheme.bits == 4:
        scale32 = np.where(high > -low, high, low) / np.float32(-8)
        lowest, highest = -8, 7
    else:
        scale32 = np.maximum(high, -low) / np.float32(127)
        lowest, highest = -127, 127
    if not np.all(np.abs(scale32) <= FLOAT16_MAX):  # also catches NaN
        raise CheckpointError(
            f"weights reach {np.abs(weights).max()}, which no float16 scale can hold: the checkpoint is damaged"
        )
    scale = scale32.astype(np.float16)
    used = scale.astype(np.float32)
    # A block whose scale rounds to zero holds nothing that float16 can express: it becomes zero.
    inverse = np.divide(np.float32(1), used, out=np.zeros_like(used), where=used != 0)
    scaled = blocks * inverse[..., None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, lowest, highest, out=scaled)
    return Blocks(scaled.astype(np.int8), scale, columns)


def dequantize_blocks(blocks: Blocks) -> NDArray[np.float32]:
    """The inverse of `quantize_blocks`, up to its rounding: (rows, columns) float32."""
    weights = blocks.q.astype(np.float32) * blocks.scale.astype(np.float32)[..., None]
    return weights.reshape(len(weights), -1)[:, : blocks.columns]


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
