"""Quantised blocks and their bytes: worked by hand, against gguf's own dequantiser, and round trips."""

from __future__ import annotations

from typing import Literal

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from phisight.errors import CheckpointError
from phisight.quant.blocks import (
    Blocks,
    dequantize_blocks,
    dequantize_channels,
    quantize_blocks,
    quantize_channels,
)
from phisight.quant.packing import pack_matmul_nbits, unpack_matmul_nbits
from phisight.quant.scheme import BlockScheme, ChannelScheme, FloatScheme

BITS: tuple[Literal[4, 8], ...] = (4, 8)
SIZES: tuple[Literal[32, 64, 128], ...] = (32, 64, 128)
Q4, Q8 = BlockScheme(4, 32), BlockScheme(8, 32)


def _row(*values: float, size: int = 32) -> NDArray[np.float32]:
    """One row of one block: the values, then zeros."""
    row = np.zeros((1, size), np.float32)
    row[0, : len(values)] = values
    return row


def _quantized(row: NDArray[np.float32], scheme: BlockScheme) -> tuple[list[int], float]:
    blocks = quantize_blocks(row, scheme)
    return blocks.q[0, 0].tolist(), float(blocks.scale[0, 0])


def test_four_bits_by_hand() -> None:
    """The largest magnitude becomes -8, whatever its sign; halves go to the even neighbour."""
    q, scale = _quantized(_row(2.0, 1.0, -1.75, -0.25, 0.125, 0.375, 0.3), Q4)
    assert scale == -0.25
    assert q[:8] == [-8, -4, 7, 1, 0, -2, -1, 0]

    q, scale = _quantized(_row(-2.0, 1.0, 1.75, -0.25, 0.125, 0.375, 0.3), Q4)
    assert scale == 0.25
    assert q[:8] == [-8, 4, 7, -1, 0, 2, 1, 0]

    # There is no +8: the opposite of the largest magnitude loses one step.
    q, scale = _quantized(_row(-2.0, 2.0), Q4)
    assert (q[:2], scale) == ([-8, 7], 0.25)


def test_eight_bits_by_hand() -> None:
    q, scale = _quantized(_row(127 / 128, -1 / 128, -0.5, 1.5 / 128, 2.5 / 128), Q8)
    assert scale == 1 / 128
    assert q[:6] == [127, -1, -64, 2, 2, 0]
    q, scale = _quantized(_row(-127 / 128, 1 / 128), Q8)
    assert (q[:2], scale) == ([-127, 1], 1 / 128)


def test_weights_are_rounded_against_the_rounded_scale() -> None:
    """1 / 127 is 1032 x 2^-17 in float16, a little less: 0.49998 is 63.497 of the one and 63.501 of the other."""
    q, scale = _quantized(_row(1.0, 0.49998), Q8)
    assert scale == 1032 * 2.0**-17
    assert q[:2] == [127, 64]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", SIZES)
def test_each_block_has_its_own_scale(bits: Literal[4, 8], size: Literal[32, 64, 128]) -> None:
    lowest = -8 if bits == 4 else -127
    weights = np.zeros((2, 2 * size), np.float32)
    weights[0, 0], weights[0, size], weights[1, 2 * size - 1] = lowest * 0.5, lowest * 4.0, lowest * 0.125
    blocks = quantize_blocks(weights, BlockScheme(bits, size))
    assert blocks.q.shape == (2, 2, size)
    assert blocks.scale.tolist() == [[0.5, 4.0], [0.0, 0.125]]
    assert blocks.q[1, 1].tolist() == [0] * (size - 1) + [lowest]
    np.testing.assert_array_equal(dequantize_blocks(blocks), weights)


@pytest.mark.parametrize(("bits", "filler"), [(4, 0x88), (8, 0x80)])
def test_rows_that_do_not_fill_their_blocks(bits: Literal[4, 8], filler: int) -> None:
    """4304 columns of the vision tower are 134.5 blocks of 32: half of the last one is zeros."""
    scheme = BlockScheme(bits, 32)
    assert scheme.blocks_per_row(4304) == 135
    assert scheme.stored_bytes((10, 4304)) == 10 * 135 * (4 * bits + 2)
    weights = np.random.default_rng(0).normal(size=(3, 4304)).astype(np.float32)
    blocks = quantize_blocks(weights, scheme)
    assert blocks.q.shape == (3, 135, 32)
    assert blocks.columns == 4304
    assert not blocks.q[:, -1, 16:].any()
    packed = pack_matmul_nbits(blocks.q, bits)
    assert packed.nbytes + blocks.scale.nbytes == scheme.stored_bytes(weights.shape)
    assert (packed[:, -1, packed.shape[-1] // 2 :] == filler).all()
    restored = dequantize_blocks(blocks)
    assert restored.shape == (3, 4304)
    # The padding changes nothing: whole blocks are as without it.
    np.testing.assert_array_equal(restored[:, :4288], dequantize_blocks(quantize_blocks(weights[:, :4288], scheme)))


@pytest.mark.parametrize("scheme", [Q4, Q8])
def test_zeros_stay_zeros(scheme: BlockScheme) -> None:
    blocks = quantize_blocks(np.zeros((2, 64), np.float32), scheme)
    assert not blocks.q.any()
    assert not dequantize_blocks(blocks).any()


@pytest.mark.parametrize("scheme", [Q4, Q8])
def test_what_float16_cannot_express_becomes_zero(scheme: BlockScheme) -> None:
    """1e-9 / 8 is far below 2^-25, half of float16's smallest number."""
    with np.errstate(all="raise", under="ignore"):
        blocks = quantize_blocks(_row(1e-9, -5e-10), scheme)
    assert not dequantize_blocks(blocks).any()


def test_the_smallest_scale() -> None:
    """2^-24 is float16's smallest number."""
    q, scale = _quantized(_row(-8 * 2.0**-24, 3 * 2.0**-24, 7 * 2.0**-24), Q4)
    assert (q[:3], scale) == ([-8, 3, 7], 2.0**-24)
    # 1.4 x 2^-24 rounds to it: the largest weight is out of reach by its scale and is held at the edge.
    q, scale = _quantized(_row(-8 * 1.4 * 2.0**-24, 2.0**-24), Q4)
    assert (q[:2], scale) == ([-8, 1], 2.0**-24)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 8.4e6, -3e38])
@pytest.mark.parametrize("scheme", [Q4, Q8])
def test_weights_that_no_scale_holds(value: float, scheme: BlockScheme) -> None:
    weights = np.zeros((4, 72), np.float32)
    weights[2, 70] = value
    with pytest.raises(CheckpointError, match=r"^weights reach .*: the checkpoint is damaged$"):
        quantize_blocks(weights, scheme)


def test_the_largest_weights_that_a_scale_holds() -> None:
    q, scale = _quantized(_row(-8 * 65504.0), Q4)
    assert (q[0], scale) == (-8, 65504.0)
    with pytest.raises(CheckpointError):
        quantize_blocks(_row(-8 * 65505.0), Q4)


def test_packing_by_hand() -> None:
    q = np.array([[[-8, 7, 0, -1]]], np.int8)
    assert pack_matmul_nbits(q, 4).tolist() == [[[0xF0, 0x78]]]  # 0 and 15, 8 and 7: the even one in the low half
    assert pack_matmul_nbits(q, 8).tolist() == [[[120, 135, 128, 127]]]
    assert pack_matmul_nbits(np.array([[[-127, 127]]], np.int8), 8).tolist() == [[[1, 255]]]


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from(BITS), st.sampled_from(SIZES))
def test_packing_round_trip(data: st.DataObject, bits: Literal[4, 8], size: int) -> None:
    limit = 1 << (bits - 1)
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), size)
    q = data.draw(arrays.arrays(np.int8, shape, elements=st.integers(-limit, limit - 1)))
    packed = pack_matmul_nbits(q, bits)
    assert packed.shape == (*shape[:2], size * bits // 8)
    np.testing.assert_array_equal(unpack_matmul_nbits(packed, bits), q)


WEIGHTS = st.floats(-1e4, 1e4, width=32).map(lambda value: value if abs(value) > 1e-2 else 0.0)


@settings(deadline=None, max_examples=50)
@given(st.data(), st.sampled_from(BITS), st.sampled_from(SIZES))
def test_rounding_error(data: st.DataObject, bits: Literal[4, 8], size: Literal[32, 64, 128]) -> None:
    """No weight moves by more than half a step, or a whole one where four bits have no +8; ranges are kept."""
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 200)))
    weights = data.draw(arrays.arrays(np.float32, shape, elements=WEIGHTS))
    blocks = quantize_blocks(weights, BlockScheme(bits, size))
    assert blocks.q.min() >= (-8 if bits == 4 else -127)
    assert blocks.q.max() <= (7 if bits == 4 else 127)
    step = np.repeat(np.abs(blocks.scale.astype(np.float32)), size, axis=1)[:, : shape[1]]
    error = np.abs(dequantize_blocks(blocks) - weights)
    # The scale itself is rounded to 11 bits, which moves the largest weight by up to 127 / 2048 of a step.
    allowed = np.where((bits == 4) & (np.abs(weights) > 7.4 * step), 1.01, 0.501)
    assert (error <= allowed * step).all()
    # Rounding again changes nothing.
    again = quantize_blocks(dequantize_blocks(blocks), BlockScheme(bits, size))
    np.testing.assert_array_equal(dequantize_blocks(again), dequantize_blocks(blocks))


def _gguf_blocks(blocks: Blocks, bits: int) -> NDArray[np.uint8]:
    """The bytes of GGUF's Q4_0 or Q8_0 for the same integers and scales.

    A scale, then: Q4_0, 16 bytes with weight i in the low and weight i + 16 in the high half, both about 8; Q8_0, 32
    signed bytes. https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
    """
    if bits == 8:
        data = blocks.q.view(np.uint8)
    else:
        about = (blocks.q + 8).astype(np.uint8)
        data = about[..., :16] | (about[..., 16:] << 4)
    scale = blocks.scale[..., None].view(np.uint8)
    return np.concatenate([scale, data], axis=-1).reshape(len(blocks.q), -1)


@pytest.mark.parametrize(
    ("scheme", "kind"), [(Q4, gguf.GGMLQuantizationType.Q4_0), (Q8, gguf.GGMLQuantizationType.Q8_0)]
)
def test_blocks_of_32_are_those_of_gguf(scheme: BlockScheme, kind: gguf.GGMLQuantizationType) -> None:
    weights = np.random.default_rng(1).normal(scale=0.02, size=(5, 128)).astype(np.float32)
    weights[3, 32:64] = 0
    blocks = quantize_blocks(weights, scheme)
    ours = dequantize_blocks(blocks)
    raw = _gguf_blocks(blocks, scheme.bits)
    assert raw.nbytes == scheme.stored_bytes(weights.shape)
    np.testing.assert_array_equal(ours, gguf.quants.dequantize(raw, kind))
    # And no worse than gguf's own quantiser of the same weights.
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
    assert np.square(ours - weights).sum() <= 1.01 * np.square(theirs - weights).sum()


def test_channels_by_hand() -> None:
    channels = quantize_channels(np.array([[1.27, -0.635, 0.01], [0, 0, 0], [-254, 2, 3]], np.float32))
    np.testing.assert_allclose(channels.scale, [0.01, 0, 2], rtol=1e-6)
    assert channels.q[1:].tolist() == [[0, 0, 0], [-127, 1, 2]]
    assert channels.q[0, [0, 2]].tolist() == [127, 1]
    assert abs(channels.q[0, 1]) in (63, 64)  # a half, up to the rounding of 0.01
    np.testing.assert_allclose(dequantize_channels(channels)[2], [-254, 2, 4])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_channels_that_are_not_finite(value: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_channels(np.array([[1, value]], np.float32))


def test_stored_bytes_of_other_schemes() -> None:
    assert FloatScheme("f32").stored_bytes((3, 5)) == 60
    assert FloatScheme("f16").stored_bytes((7,)) == 14
    assert ChannelScheme().stored_bytes((3, 5)) == 3 * 5 + 3 * 4
