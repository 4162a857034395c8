"""Ways to multiply a chunk of a prompt with INT4 weights: seconds, error and memory of one matrix of the 15B model.

    python bench/prefill_ways.py [--tokens 256,512,1024] [--threads N] [--runs 3]

    MatMulNBits            INT4 blocks of 32 and 128 unpacked as they are used, at both accuracy levels
    INT8 copy              the same INT4 weights, rounded to INT8 once per row and kept: MatMulInteger on rounded rows
    unpacked when used     the INT4 weights as ONNX INT4, unpacked to such INT8 in the graph at every run; unsigned
                           about 128, since signed ones that are not constant saturate without VNNI

The error is that of the product, relative to float32 on the same INT4 weights: what the way adds, not what INT4 costs.
Runs of all ways take turns; the least of each counts. The matrix is 5120 to 17920, of the feed-forward layer.
"""

from __future__ import annotations

import argparse
import sys
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from phisight.backends.ort_session import import_onnxruntime, integer_products
from phisight.threads import choose_threads, read_threads

COLUMNS, ROWS = 5120, 17920
BLOCKS = (32, 128)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="256,512,1024", metavar="N,...")
    parser.add_argument("--threads", default="auto", metavar="N")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    threads = choose_threads(read_threads(args.threads)).count
    rng = np.random.default_rng(0)
    ways: dict[str, tuple[Any, NDArray[np.float32], float]] = {}
    for block in BLOCKS:
        levels = rng.integers(-8, 8, (ROWS, COLUMNS // block, block), dtype=np.int8)
        scales = rng.uniform(0.5, 1.5, (ROWS, COLUMNS // block, 1)).astype(np.float16).astype(np.float32) / 100
        weights = (levels * scales).reshape(ROWS, COLUMNS)
        for level in (0, 4):
            session = opened(blocks_graph(levels, scales, block, level), threads)
            ways[f"MatMulNBits, block {block}, level {level}"] = session, weights, 0.5 + 4 / block
        if block == BLOCKS[0]:
            row = np.abs(weights).max(axis=1, keepdims=True) / 127
            kept = np.rint(weights / row).astype(np.int8)
            ways["INT8 copy"] = opened(integer_graph(kept, row), threads), weights, 0.5 + 4 / block + 1
            unpacking = opened(unpacking_graph(levels, scales, row, block), threads)
            ways["unpacked when used"] = unpacking, weights, 0.5 + 4 / block
    print(f"{threads} threads, integer products exact without help: {integer_products().matmul_integer}")
    counts = [int(part) for part in args.tokens.split(",")]
    print("| way | bytes a weight in memory | error |" + "".join(f" {n} tokens |" for n in counts))
    print("|---|---|---|" + "---|" * len(counts))
    least: dict[str, list[float]] = {name: [float("inf")] * len(counts) for name in ways}
    errors = {}
    for i, count in enumerate(counts):
        x = rng.normal(0, 1, (count, COLUMNS)).astype(np.float32)
        for _ in range(args.runs + 1):
            for name, (session, weights, _size) in ways.items():
                began = perf_counter()
                y = session.run(None, {"x": x})[0]
                least[name][i] = min(least[name][i], perf_counter() - began)
                if name not in errors:
                    right = x @ weights.T
                    errors[name] = float(np.linalg.norm(y - right) / np.linalg.norm(right))
    for name, (_, _, size) in ways.items():
        print(f"| {name} | {size:.2f} | {errors[name]:.1e} |" + "".join(f" {1000 * s:.0f} ms |" for s in least[name]))
    return 0


def blocks_graph(levels: NDArray[np.int8], scales: NDArray[np.float32], block: int, level: int) -> bytes:
    halves = (levels + 8).astype(np.uint8)
    packed = halves[..., ::2] | halves[..., 1::2] << 4
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        K=COLUMNS,
        N=ROWS,
        bits=4,
        block_size=block,
        accuracy_level=level,
    )
    return model([node], {"packed": packed, "scales": scales[..., 0]})


def integer_graph(kept: NDArray[np.int8], row: NDArray[np.float32]) -> bytes:
    return model(rounded_product("kept"), {"kept": np.ascontiguousarray(kept.T), "row": row[:, 0]})


def unpacking_graph(
    levels: NDArray[np.int8], scales: NDArray[np.float32], row: NDArray[np.float32], block: int
) -> bytes:
    """Scales relative to the row's, so that unpacking gives whole numbers about 128; stored (columns, rows)."""
    relative = np.ascontiguousarray((scales[..., 0] / row).T)
    nodes = [
        helper.make_node("DequantizeLinear", ["levels", "relative"], ["unpacked"], axis=0, block_size=block),
        helper.make_node("QuantizeLinear", ["unpacked", "unit", "middle"], ["kept"]),
        *rounded_product("kept", "middle"),
    ]
    values = {"relative": relative, "row": row[:, 0]}
    stored = helper.make_tensor(
        "levels", TensorProto.INT4, (COLUMNS, ROWS), levels.reshape(ROWS, COLUMNS).T.ravel().tolist()
    )
    return model(nodes, values, stored)


def rounded_product(weights: str, *zero_point: str) -> list[Any]:
    """x, its rows rounded to UINT8 about 128, times INT8 weights (columns, rows), which may have a zero point."""
    node = helper.make_node
    return [
        node("Abs", ["x"], ["size"]),
        node("ReduceMax", ["size", "last"], ["most"], keepdims=1),
        node("Div", ["most", "limit"], ["step"]),
        node("Div", ["x", "step"], ["steps"]),
        node("QuantizeLinear", ["steps", "unit", "middle"], ["rounded"]),
        node("MatMulInteger", ["rounded", weights, "middle", *zero_point], ["sums"]),
        node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", "row"], ["scaled"]),
        node("Mul", ["scaled", "step"], ["y"]),
    ]


def model(nodes: list[Any], values: dict[str, Any], *stored: Any) -> bytes:
    constants = {"last": np.array([-1]), "limit": np.float32(127), "unit": np.float32(1), "middle": np.uint8(128)}
    used = {name for node in nodes for name in node.input}
    tensors = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in (constants | values).items() if name in used
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", COLUMNS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", ROWS])
    graph = helper.make_graph(nodes, "way", [x], [y], [*tensors, *stored])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(made.SerializeToString())


def opened(graph: bytes, threads: int) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not integer_products().matmul_integer:
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Folding would unpack the weights once and keep them.
    return ort.InferenceSession(
        graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )


if __name__ == "__main__":
    sys.exit(main())
