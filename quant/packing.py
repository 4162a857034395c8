"""The bytes of each block format, every encoder beside its decoder.

MatMulNBits (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits):
`B` is (rows, blocks, block_size * bits / 8) uint8. A weight is stored as q + 2^(bits - 1); for 4 bits the even one of a
pair sits in the low half of the byte. Zero points, stored likewise, are (rows, ceil(blocks * bits / 8)) uint8, one row
after the other with each row's last byte filled up; without them every zero point is 2^(bits - 1).

GGUF (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h): blocks of 32 in the order of the row, each
with its float16 scale in front. Q4_0 stores q + 8, weight i in the low and weight i + 16 in the high half of byte i;
Q8_0 stores q as a signed byte. Neither has a zero point, and Q4_1 holds a float16 minimum instead: asymmetric blocks
are not written to GGUF.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.quant.blocks import Blocks

__all__ = [
    "pack_matmul_nbits",
    "pack_q4_0",
    "pack_q8_0",
    "pack_zero_points",
    "unpack_matmul_nbits",
    "unpack_q4_0",
    "unpack_q8_0",
    "unpack_zero_points",
]


def pack_matmul_nbits(q: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """(rows, blocks, block_size) int8 -> (rows, blocks, block_size * bits / 8) uint8."""
    if bits == 8:
        return q.view(np.uint8) ^ np.uint8(128)
    unsigned = (q + np.int8(8)).view(np.uint8)
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << np.uint8(4))


def unpack_matmul_nbits(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """The inverse of `pack_matmul_nbits`."""
    if bits == 8:
        return (packed ^ np.uint8(128)).view(np.int8)
    q = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    q[..., 0::2] = packed & np.uint8(15)
    q[..., 1::2] = packed >> np.uint8(4)
    return q - np.int8(8)


def pack_zero_points(zero: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """(rows, blocks) int8 -> (rows, ceil(blocks * bits / 8)) uint8."""
    if bits == 4 and zero.shape[1] % 2:
        zero = np.pad(zero, ((0, 0), (0, 1)))
    return pack_matmul_nbits(zero, bits)


def unpack_zero_points(packed: NDArray[np.uint8], bits: int, blocks: int) -> NDArray[np.int8]:
    """The inverse of `pack_zero_points`: (rows, blocks) int8."""
    return unpack_matmul_nbits(packed, bits)[:, :blocks]


def pack_q4_0(blocks: Blocks) -> NDArray[np.uint8]:
    """INT4 blocks of 32 -> (rows, blocks x 18) uint8. Raises InputError for asymmetric ones."""
    _check_symmetric(blocks, "Q4_0")
    unsigned = (blocks.q + np.int8(8)).view(np.uint8)
    return _with_scales(blocks.scale, unsigned[..., :16] | (unsigned[..., 16:] << np.uint8(4)))


def unpack_q4_0(packed: NDArray[np.uint8]) -> Blocks:
    """The inverse of `pack_q4_0`."""
    scale, data = _without_scales(packed, 18)
    q = np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1).view(np.int8) - np.int8(8)
    return Blocks(q, scale, q.shape[1] * 32)


def pack_q8_0(blocks: Blocks) -> NDArray[np.uint8]:
    """INT8 blocks of 32 -> (rows, blocks x 34) uint8. Raises InputError for asymmetric ones."""
    _check_symmetric(blocks, "Q8_0")
    return _with_scales(blocks.scale, blocks.q.view(np.uint8))


def unpack_q8_0(packed: NDArray[np.uint8]) -> Blocks:
    """The inverse of `pack_q8_0`."""
    scale, data = _without_scales(packed, 34)
    q = np.ascontiguousarray(data).view(np.int8)
    return Blocks(q, scale, q.shape[1] * 32)


def _check_symmetric(blocks: Blocks, kind: str) -> None:
    if blocks.zero is not None:
        raise InputError(f"GGUF's {kind} holds no zero points: quantise symmetrically, or export to ONNX")


def _with_scales(scale: NDArray[np.float16], data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(rows, blocks) and (rows, blocks, bytes) -> (rows, blocks x (2 + bytes)), little-endian."""
    rows, blocks, size = data.shape
    packed = np.empty((rows, blocks, 2 + size), np.uint8)
    packed[..., :2] = scale.astype("<f2")[..., None].view(np.uint8)
    packed[..., 2:] = data
    return packed.reshape(rows, -1)


def _without_scales(packed: NDArray[np.uint8], size: int) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    blocks = packed.reshape(len(packed), -1, size)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float16)
    return scale, blocks[..., 2:]
