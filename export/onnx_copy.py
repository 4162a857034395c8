"""The graph with which the runtime puts an array into a GPU's memory: x (1, h, n, d) -> y, the same.

Run as `python -m phisight.export.onnx_copy DIRECTORY` to write the files that ship with the runtime, one for each type.
"""

from __future__ import annotations

import sys
from pathlib import Path

from phisight.export.onnx_graph import GraphBuilder

__all__ = ["TYPES", "copy_graph"]

TYPES = ("float32", "float16")


def copy_graph(dtype: str) -> bytes:
    """The serialised graph."""
    graph = GraphBuilder("copy", "")
    shape: list[int | str] = [1, "h", "n", "d"]
    graph.node("Identity", [graph.input("x", dtype, shape)], outputs=["y"])
    graph.output("y", dtype, shape)
    return bytes(graph.model().SerializeToString(deterministic=True))


if __name__ == "__main__":
    for name in TYPES:
        (Path(sys.argv[1]) / f"copy_{name}.onnx").write_bytes(copy_graph(name))
