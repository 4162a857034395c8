"""Small graphs that ship with the runtime: to put an array into a GPU's memory, and to measure what a device can do.

Run as `python -m phisight.export.onnx_small DIRECTORY` to write the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from phisight.export.onnx_graph import GraphBuilder

__all__ = ["small_graphs"]

SIDE = 2048
"""Of the integer product's constant matrix."""


def small_graphs() -> dict[str, bytes]:
    """The serialised graphs by their files' names."""
    return {
        "copy_float32.onnx": _copy("float32"),
        "copy_float16.onnx": _copy("float16"),
        "product_float16.onnx": _product("float16"),
        "integer_peak.onnx": _integer_peak(),
    }


def _copy(dtype: str) -> bytes:
    """x (1, h, n, d) -> y, the same."""
    graph = GraphBuilder("copy", "")
    shape: list[int | str] = [1, "h", "n", "d"]
    graph.node("Identity", [graph.input("x", dtype, shape)], outputs=["y"])
    graph.output("y", dtype, shape)
    return _serialised(graph)


def _product(dtype: str) -> bytes:
    """a (m, k) and b (k, n) -> y (m, n)."""
    graph = GraphBuilder("product", "")
    factors = [graph.input("a", dtype, ["m", "k"]), graph.input("b", dtype, ["k", "n"])]
    graph.node("MatMul", factors, outputs=["y"])
    graph.output("y", dtype, ["m", "n"])
    return _serialised(graph)


def _integer_peak() -> bytes:
    """a (m, SIDE) uint8, times a constant int8 matrix that the engine makes of one value -> y int32."""
    graph = GraphBuilder("integer_peak", "")
    constant = graph.node("Expand", [graph.constant(np.array([[5]]), "int8"), graph.constant([SIDE, SIDE])])
    graph.node("MatMulInteger", [graph.input("a", "uint8", ["m", SIDE]), constant], outputs=["y"])
    graph.output("y", "int32", ["m", SIDE])
    return _serialised(graph)


def _serialised(graph: GraphBuilder) -> bytes:
    return bytes(graph.model().SerializeToString(deterministic=True))


if __name__ == "__main__":
    for name, content in small_graphs().items():
        (Path(sys.argv[1]) / name).write_bytes(content)
