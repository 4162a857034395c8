"""The graph with which the runtime tries this processor's integer products at load.

    unsigned (n, 64) uint8 -> integer (n, 32) int32 = unsigned @ 127s, by MatMulInteger
    floats (n, 64) float32 -> blocks (n, 32) float32 = floats @ 127s, by MatMulNBits with 8 bits and INT8 activations

Run as `python -m phisight.export.onnx_saturation FILE` to write the file that ships with the runtime.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from phisight.export.onnx_graph import GraphBuilder

__all__ = ["saturation_graph"]

COLUMNS, ROWS, BLOCK = 64, 32, 32


def saturation_graph() -> bytes:
    """The serialised graph."""
    graph = GraphBuilder("saturation", "")
    unsigned = graph.input("unsigned", "uint8", ["n", COLUMNS])
    floats = graph.input("floats", "float32", ["n", COLUMNS])
    weights = graph.constant(np.full((COLUMNS, ROWS), 127), "int8")
    graph.node("MatMulInteger", [unsigned, weights], outputs=["integer"])
    packed = graph.constant(np.full((ROWS, COLUMNS // BLOCK, BLOCK), 255), "uint8")  # 127 about 128
    scales = graph.constant(np.ones((ROWS, COLUMNS // BLOCK)), "float32")
    graph.microsoft(
        "MatMulNBits",
        [floats, packed, scales],
        outputs=["blocks"],
        K=COLUMNS,
        N=ROWS,
        bits=8,
        block_size=BLOCK,
        accuracy_level=4,
    )
    graph.output("integer", "int32", ["n", ROWS])
    graph.output("blocks", "float32", ["n", ROWS])
    return bytes(graph.model().SerializeToString(deterministic=True))


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(saturation_graph())
