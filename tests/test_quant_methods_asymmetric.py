"""Asymmetric blocks: worked by hand, packed, and multiplied by ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from phisight.errors import CheckpointError, InputError
from phisight.quant.blocks import Blocks, dequantize_blocks, quantize_blocks
from phisight.quant.packing import (
    pack_matmul_nbits,
    pack_q4_0,
    pack_q8_0,
    pack_zero_points,
    unpack_zero_points,
)
from phisight.quant.scheme import BlockScheme

A4, A8 = BlockScheme(4, 32, symmetric=False), BlockScheme(8, 32, symmetric=False)


def test_by_hand() -> None:
    w = np.zeros((2, 32), np.float32)
    w[0, :4] = [-1, 2.75, 0.26, -0.37]  # 15 steps of 0.25, four of them below zero
    w[1, :2] = [7.5, 1]  # nothing below zero
    blocks = quantize_blocks(w, A4)
    assert blocks.zero is not None
    assert blocks.scale.tolist() == [[0.25], [0.5]]
    assert blocks.zero.tolist() == [[-4], [-8]]
    assert blocks.q[0, 0, :5].tolist() == [-8, 7, -3, -5, -4]
    assert blocks.q[1, 0, :3].tolist() == [7, -6, -8]
    assert dequantize_blocks(blocks)[0, :5].tolist() == [-1, 2.75, 0.25, -0.25, 0]
    assert (A4.lowest, A4.highest, A8.lowest, A8.highest) == (-8, 7, -128, 127)
    assert A4.label == "int4 block 32 asymmetric"


@pytest.mark.parametrize("scheme", [A4, A8])
def test_zeros_and_damage(scheme: BlockScheme) -> None:
    assert not dequantize_blocks(quantize_blocks(np.zeros((2, 40), np.float32), scheme)).any()
    tiny = np.full((1, 32), 1e-9, np.float32)
    assert not dequantize_blocks(quantize_blocks(tiny, scheme)).any()
    for value in (np.nan, np.inf, -np.inf, 3e38):
        tiny[0, 7] = value
        with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
            quantize_blocks(tiny, scheme)


@given(st.integers(1, 5), st.integers(1, 7), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_zero_points_round_trip(rows: int, blocks: int, bits: int, seed: int) -> None:
    limit = 1 << (bits - 1)
    zero = np.random.default_rng(seed).integers(-limit, limit, (rows, blocks)).astype(np.int8)
    packed = pack_zero_points(zero, bits)
    assert packed.shape == (rows, -(-blocks * bits // 8))
    np.testing.assert_array_equal(unpack_zero_points(packed, bits, blocks), zero)


def test_zero_points_by_hand() -> None:
    assert pack_zero_points(np.array([[-8, 7, -1]], np.int8), 4).tolist() == [[0xF0, 0x87]]
    assert pack_zero_points(np.array([[-128, 0, 127]], np.int8), 8).tolist() == [[0, 128, 255]]


def _multiplied(x: NDArray[np.float32], blocks: Blocks, bits: int) -> NDArray[np.float32]:
    """x @ w.T by ONNX Runtime, exact in the activations (accuracy_level 0)."""
    assert blocks.zero is not None
    rows, _, size = blocks.q.shape
    constants = {
        "packed": pack_matmul_nbits(blocks.q, bits),
        "scales": blocks.scale.astype(np.float32),
        "zero_points": pack_zero_points(blocks.zero, bits),
    }
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=blocks.columns,
        N=rows,
        bits=bits,
        block_size=size,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", blocks.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    product: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return product


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("columns", [128, 144])
@pytest.mark.parametrize("tokens", [1, 5])
def test_onnx_runtime_multiplies_them(
    bits: Literal[4, 8], size: Literal[32, 64, 128], columns: int, tokens: int
) -> None:
    """144 columns are 4.5, 2.25 and 1.125 blocks; weights lean to one side, so that zero points matter."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(6, columns)) + rng.normal(size=(6, 1)) * 2).astype(np.float32)
    scheme = BlockScheme(bits, size, symmetric=False)
    blocks = quantize_blocks(w, scheme)
    assert blocks.zero is not None
    assert len(np.unique(blocks.zero)) > 2
    stored = pack_matmul_nbits(blocks.q, bits).nbytes + blocks.scale.nbytes + pack_zero_points(blocks.zero, bits).nbytes
    assert stored == scheme.stored_bytes(w.shape)
    restored = dequantize_blocks(blocks)
    assert np.abs(restored - w).max() < (0.5 if bits == 4 else 0.04)
    x = rng.normal(size=(tokens, columns)).astype(np.float32)
    np.testing.assert_allclose(_multiplied(x, blocks, bits), x @ restored.T, atol=2e-4)


def test_gguf_refuses_them() -> None:
    w = np.ones((2, 32), np.float32)
    with pytest.raises(InputError, match=r"^GGUF's Q4_0 holds no zero points"):
        pack_q4_0(quantize_blocks(w, A4))
    with pytest.raises(InputError, match=r"^GGUF's Q8_0 holds no zero points"):
        pack_q8_0(quantize_blocks(w, A8))
