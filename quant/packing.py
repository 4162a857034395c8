"""The bytes of each block format, every encoder beside its decoder.

MatMulNBits (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits):
`B` is (rows, blocks, block_size * bits / 8) uint8. A weight is stored as q + 2^(bits - 1); for 4 bits the even one of a
pair sits in the low half of the byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["pack_matmul_nbits", "unpack_matmul_nbits"]


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
