"""One decoder layer as a graph whose weights are fed in, and whose linear layers show what goes into them.

    x (1, n, hidden) float32 -> next (1, n, hidden) float32, observed.{weight} (1, n, columns) float32

The layer is made by the exporter's own functions. Its weights are inputs, so that one session serves all layers, no
engine makes a second, rearranged copy of them, and quantised weights can stand in for a checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort_session import SessionSettings, open_session
from phisight.config import DecoderConfig, ModelConfig
from phisight.errors import EngineError
from phisight.export.names import FINAL_NORM, HEAD, decoder_layer
from phisight.export.onnx_decoder import add_and_norm, attention, feed_forward, rotation_tables
from phisight.export.onnx_graph import GraphBuilder
from phisight.export.onnx_layers import LayerBuilder
from phisight.export.plan import ExportOptions, make_plan

__all__ = ["FINAL", "LAYER", "LayerGraph", "build_final_norm", "build_layer"]

LAYER = decoder_layer(0)
"""Prefix under which the graph of any layer names its weights."""
FINAL = "final."
"""The stage behind the last layer: the norm before the head, whose input is observed as well."""


class ObservedLayers(LayerBuilder):
    """Linear layers whose weights are inputs of the graph, and whose own inputs are outputs of it."""

    def __init__(self, graph: GraphBuilder, config: ModelConfig) -> None:
        super().__init__(graph, make_plan(config, ExportOptions(decoder="f32", vision="f32")), "f32")
        self.weights: list[str] = []
        self.observed: dict[str, str] = {}
        self.tables: dict[str, NDArray[Any]] = {}

    def vector(self, name: str) -> str:
        self.weights.append(name)
        return self.graph.input(name, "float32", self.plan.specs[name].shape)

    def computed(self, name: str, array: NDArray[np.generic]) -> str:
        self.tables[name] = array
        return self.graph.input(name, array.dtype.name, array.shape)

    def linears(self, x: str, names: Sequence[str], *, bias: bool = False) -> list[str]:
        outputs = []
        for name in names:
            weight = name + ".weight"
            self.observe(x, weight)
            # The product by the transposed matrix takes the weight as it lies in the checkpoint, (rows, columns).
            y = self.graph.microsoft("FusedMatMul", [x, self.vector(weight)], transB=1)
            outputs.append(self.graph.node("Add", [y, self.vector(name + ".bias")]) if bias else y)
        return outputs

    def observe(self, x: str, weight: str) -> None:
        """Make the input `x` of the linear layer `weight` an output of the graph."""
        columns = self.plan.specs[weight].shape[1]
        output = self.graph.node("Identity", [x], outputs=[f"observed.{weight}"])
        self.observed[weight] = self.graph.output(output, "float32", [1, "positions", columns])


@dataclass(frozen=True)
class LayerGraph:
    """A session, and what it is fed. `observed` has the graph's output for each weight whose inputs are seen."""

    session: Any
    weights: tuple[str, ...]
    observed: dict[str, str]
    tables: dict[str, NDArray[Any]]
    advances: bool
    """Whether there is a next layer boundary."""
    past: dict[str, NDArray[np.float32]]

    def run(
        self, x: NDArray[np.float32], weights: dict[str, NDArray[np.float32]], *, observe: bool = True
    ) -> tuple[NDArray[np.float32] | None, dict[str, NDArray[np.float32]]]:
        """One sequence (n, hidden) -> the same at the next boundary, and the inputs (n, columns) of each linear layer.

        Raises EngineError.
        """
        feed = {"x": x[None], **weights, **self.tables, **self.past}
        if self.past:
            feed["seqlens_k"] = np.array([len(x) - 1], np.int32)
            feed["total_sequence_length"] = np.array(len(x), np.int32)
        names = [*(["next"] if self.advances else []), *(self.observed.values() if observe else ())]
        try:
            outputs = self.session.run(names, feed)
        except Exception as error:  # the engine raises classes of its own, which differ between versions
            raise EngineError(f"ONNX Runtime failed in calibration: {error}") from error
        following = outputs.pop(0)[0] if self.advances else None
        seen = {weight: output[0] for weight, output in zip(self.observed, outputs, strict=False)}
        return following, seen


def build_layer(config: ModelConfig, folder: Path, settings: SessionSettings) -> LayerGraph:
    """The graph of a decoder layer, opened. Raises EngineError."""
    decoder = config.decoder
    graph = GraphBuilder("layer", "unused")
    layers = ObservedLayers(graph, config)
    x = graph.input("x", "float32", [1, "positions", decoder.hidden_size])
    lengths = graph.input("seqlens_k", "int32", [1]), graph.input("total_sequence_length", "int32", [])
    rotation = rotation_tables(layers, decoder)
    normed = _norm(layers, decoder, x, LAYER + "input_layernorm.weight")
    mixed = attention(layers, decoder, normed, 0, lengths, rotation)
    mixed = layers.linear(mixed, LAYER + "self_attn.o_proj")
    normed, x = add_and_norm(layers, decoder, mixed, x, LAYER + "post_attention_layernorm.weight")
    inner = feed_forward(layers, normed, LAYER + "mlp.")
    graph.node("Add", [x, inner], outputs=["next"])
    graph.output("next", "float32", [1, "positions", decoder.hidden_size])
    empty = np.zeros((1, decoder.num_kv_heads, 0, decoder.head_dim), np.float32)
    return _open(graph, layers, folder, settings, {f"past.0.{kind}": empty for kind in ("key", "value")})


def build_final_norm(config: ModelConfig, folder: Path, settings: SessionSettings) -> LayerGraph:
    """The norm between the last layer and the head, opened. Raises EngineError."""
    graph = GraphBuilder("final", "unused")
    layers = ObservedLayers(graph, config)
    x = graph.input("x", "float32", [1, "positions", config.decoder.hidden_size])
    layers.observe(_norm(layers, config.decoder, x, FINAL_NORM), HEAD)
    return _open(graph, layers, folder, settings, {})


def _norm(layers: LayerBuilder, decoder: DecoderConfig, x: str, weight: str) -> str:
    inputs = [x, layers.vector(weight)]
    return layers.graph.node("SimplifiedLayerNormalization", inputs, axis=-1, epsilon=decoder.rms_norm_eps)


def _open(
    graph: GraphBuilder,
    layers: ObservedLayers,
    folder: Path,
    settings: SessionSettings,
    past: dict[str, NDArray[np.float32]],
) -> LayerGraph:
    path = folder / f"{graph.name}.onnx"
    path.write_bytes(graph.model().SerializeToString(deterministic=True))
    session = open_session(path, settings)
    return LayerGraph(session, tuple(layers.weights), layers.observed, layers.tables, bool(past), past)
