"""The vision graph: patches of any grid -> image tokens.

    pixel_values (n, 768) float32, grid (2,) int64 = rows, columns with rows x columns = n
    -> image_features (n, hidden) float32, hidden being the decoder's

SigLIP2 (https://arxiv.org/abs/2502.14786) up to the layer before the last, then the two-layer projector.
"""

from __future__ import annotations

import numpy as np

from phisight.config import VisionConfig
from phisight.export.names import PATCH_EMBEDDING, POSITION_TABLE, PROJECTOR, vision_layer
from phisight.export.onnx_graph import GraphBuilder
from phisight.export.onnx_layers import LayerBuilder, WeightJob
from phisight.export.plan import Plan

__all__ = ["build_vision"]


def build_vision(config: VisionConfig, hidden: int, plan: Plan, data_file: str) -> tuple[GraphBuilder, list[WeightJob]]:
    """The graph and the jobs that fill its data file. `hidden` is the decoder's width."""
    graph = GraphBuilder("vision", data_file)
    layers = LayerBuilder(graph, plan, plan.options.vision_float)
    pixels = graph.input("pixel_values", "float32", ["patches", config.patch_dim])
    grid = graph.input("grid", "int64", [2])

    batch = graph.node("Unsqueeze", [pixels, graph.constant([0])])  # (1, n, 768)
    if layers.dtype != "float32":
        batch = layers.cast(batch, layers.dtype)
    x = layers.linear(batch, PATCH_EMBEDDING, bias=True)
    x = graph.node("Add", [x, _position_embedding(layers, config, grid)])  # (1, n, width)
    for i in range(config.used_layers):
        x = _layer(layers, config, x, vision_layer(i))
    x = layers.linear(x, PROJECTOR[0], bias=True)
    x = graph.node("Gelu", [x], approximate="none")
    x = layers.linear(x, PROJECTOR[1], bias=True)
    if layers.dtype != "float32":
        x = layers.cast(x, "float32")
    graph.node("Squeeze", [x, graph.constant([0])], outputs=["image_features"])
    graph.output("image_features", "float32", ["patches", hidden])
    return graph, layers.jobs


def _layer(layers: LayerBuilder, config: VisionConfig, x: str, prefix: str) -> str:
    """One encoder layer, (1, n, width) -> (1, n, width)."""
    graph = layers.graph
    normed = _layer_norm(layers, config, x, prefix + "layer_norm1")
    attention = prefix + "self_attn."
    q, k, v = layers.linears(normed, [attention + name for name in ("q_proj", "k_proj", "v_proj")], bias=True)
    mixed = graph.microsoft("MultiHeadAttention", [q, k, v], num_heads=config.num_heads)
    x = graph.node("Add", [x, layers.linear(mixed, attention + "out_proj", bias=True)])
    inner = layers.linear(_layer_norm(layers, config, x, prefix + "layer_norm2"), prefix + "mlp.fc1", bias=True)
    inner = graph.node("Gelu", [inner], approximate="tanh")
    return graph.node("Add", [x, layers.linear(inner, prefix + "mlp.fc2", bias=True)])


def _layer_norm(layers: LayerBuilder, config: VisionConfig, x: str, name: str) -> str:
    weight, bias = layers.vector(name + ".weight"), layers.vector(name + ".bias")
    return layers.graph.node("LayerNormalization", [x, weight, bias], axis=-1, epsilon=config.layer_norm_eps)


def _position_embedding(layers: LayerBuilder, config: VisionConfig, grid: str) -> str:
    """The learned table resized to the grid: bilinear, antialiased, half-pixel centres -> (n, width).

    Both axes are small matrices of triangle weights, computed in the graph from the grid, so that every engine gives
    the same values: (rows, side) @ table, then (columns, side) @ each row.
    """
    graph, side, width = layers.graph, config.table_side, config.hidden_size
    table = layers.vector(POSITION_TABLE)
    if layers.dtype != "float32":
        table = layers.cast(table, "float32")
    rows, columns = graph.nodes("Split", [grid, graph.constant([1, 1])], 2)
    flat = graph.node("Reshape", [table, graph.constant([side, side * width])])
    resized = graph.node("MatMul", [_triangle_weights(graph, rows, side), flat])  # (rows, side x width)
    resized = graph.node("Reshape", [resized, graph.constant([-1, side, width])])
    resized = graph.node("MatMul", [_triangle_weights(graph, columns, side), resized])  # (rows, columns, width)
    resized = graph.node("Reshape", [resized, graph.constant([-1, width])])
    return resized if layers.dtype == "float32" else layers.cast(resized, layers.dtype)


def _triangle_weights(graph: GraphBuilder, count: str, side: int) -> str:
    """Weights of `side` samples for each of `count` outputs, as torch's `interpolate(antialias=True)` has them.

    Output i lies at (i + 0.5) x side / count; a sample at distance d weighs max(0, 1 - d / max(side / count, 1)),
    and each output's weights add up to 1. (count, side) float32.
    """
    n = graph.node("Cast", [count], to=1)  # (1,) float32
    scale = graph.node("Div", [graph.constant([side], "float32"), n])
    reach = graph.node("Max", [scale, graph.constant([1.0], "float32")])
    scalar = graph.node("Squeeze", [count, graph.constant([0])])
    index = graph.node("Range", [graph.constant(0), scalar, graph.constant(1)])
    centre = graph.node("Add", [graph.node("Cast", [index], to=1), graph.constant([0.5], "float32")])
    centre = graph.node("Unsqueeze", [graph.node("Mul", [centre, scale]), graph.constant([1])])  # (count, 1)
    samples = graph.constant((np.arange(side, dtype=np.float32) + 0.5)[None], "float32")  # (1, side)
    distance = graph.node("Div", [graph.node("Abs", [graph.node("Sub", [samples, centre])]), reach])
    weight = graph.node(
        "Max",
        [
            graph.node("Sub", [graph.constant([1.0], "float32"), distance]),
            graph.constant([0.0], "float32"),
        ],
    )
    total = graph.node("ReduceSum", [weight, graph.constant([1])], keepdims=1)
    return graph.node("Div", [weight, total])
