"""Layers shared by the vision and the decoder graph, and the weights that they need filled in.

Each linear layer is emitted according to the scheme of its weight:

    f32, f16     MatMul; float16 weights in a float32 graph pass a Cast that ONNX Runtime folds at load
    int4, int8   com.microsoft.MatMulNBits; scales are stored as float16, with such a Cast in a float32 graph
    int8 channel activations rounded to INT8 per row, then MatMulInteger (see `_quantize_rows`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phisight.export.onnx_graph import DTYPES, GraphBuilder
from phisight.export.plan import Plan
from phisight.quant.scheme import BlockScheme, ChannelScheme, FloatScheme, FloatType

__all__ = ["ArrayJob", "BlockJob", "ChannelJob", "FloatJob", "LayerBuilder", "WeightJob"]

NUMPY_TYPES: dict[FloatType, str] = {"f32": "float32", "f16": "float16"}


@dataclass(frozen=True)
class FloatJob:
    """Write tensor `source` as floats under `target`; a matrix is transposed to (columns, rows) if asked."""

    source: str
    target: str
    dtype: str
    transpose: bool


@dataclass(frozen=True)
class BlockJob:
    """Write tensor `source` as blocks: packed integers, float16 scales, and zero points if `zeros` names a place."""

    source: str
    packed: str
    scales: str
    scheme: BlockScheme
    zeros: str | None = None


@dataclass(frozen=True)
class ChannelJob:
    """Write tensor `source` as INT8 (columns, rows) and one float32 scale per row of the source."""

    source: str
    weight: str
    scale: str


@dataclass(frozen=True)
class ArrayJob:
    """Write an array that is computed, not read."""

    target: str
    array: NDArray[np.generic]


WeightJob = FloatJob | BlockJob | ChannelJob | ArrayJob


class LayerBuilder:
    """A graph, the plan for its weights, and the jobs that will fill its data file, in the file's order."""

    def __init__(self, graph: GraphBuilder, plan: Plan, float_type: FloatType) -> None:
        self.graph = graph
        self.plan = plan
        self.dtype = NUMPY_TYPES[float_type]
        self.jobs: list[WeightJob] = []

    def vector(self, name: str) -> str:
        """A norm's weight, a bias, or another tensor kept as it is."""
        spec, scheme = self.plan.specs[name], self.plan.schemes[name]
        assert isinstance(scheme, FloatScheme)
        dtype = NUMPY_TYPES[scheme.dtype]
        self.jobs.append(FloatJob(name, name, dtype, transpose=False))
        return self._as_float(self.graph.external(name, dtype, spec.shape), dtype)

    def computed(self, name: str, array: NDArray[np.generic]) -> str:
        """A table that is computed at export."""
        self.jobs.append(ArrayJob(name, array))
        return self.graph.external(name, array.dtype.name, array.shape)

    def linear(self, x: str, name: str, *, bias: bool = False) -> str:
        """`x @ weight.T (+ bias)`: (..., columns) -> (..., rows) for the weight `name`.weight (rows, columns)."""
        return self.linears(x, [name], bias=bias)[0]

    def linears(self, x: str, names: Sequence[str], *, bias: bool = False) -> list[str]:
        """Several linear layers of the same input, which is quantised once where they need that."""
        schemes = [self.plan.schemes[name + ".weight"] for name in names]
        rows = self._quantize_rows(x) if any(isinstance(s, ChannelScheme) for s in schemes) else None
        outputs = []
        for name, scheme in zip(names, schemes, strict=True):
            if isinstance(scheme, BlockScheme):
                outputs.append(self._block_linear(x, name, scheme, bias))
                continue
            if isinstance(scheme, ChannelScheme):
                assert rows is not None
                y = self._channel_linear(*rows, name)
            else:
                y = self._float_linear(x, name, scheme)
            outputs.append(self.graph.node("Add", [y, self.vector(name + ".bias")]) if bias else y)
        return outputs

    def cast(self, x: str, dtype: str) -> str:
        return self.graph.node("Cast", [x], to=DTYPES[dtype])

    def _as_float(self, name: str, dtype: str) -> str:
        """In the graph's float type."""
        return name if dtype == self.dtype else self.cast(name, self.dtype)

    def _float_linear(self, x: str, name: str, scheme: FloatScheme) -> str:
        weight = name + ".weight"
        rows, columns = self.plan.specs[weight].shape
        dtype = NUMPY_TYPES[scheme.dtype]
        self.jobs.append(FloatJob(weight, weight, dtype, transpose=True))
        stored = self.graph.external(weight, dtype, (columns, rows))
        return self.graph.node("MatMul", [x, self._as_float(stored, dtype)])

    def _block_linear(self, x: str, name: str, scheme: BlockScheme, bias: bool) -> str:
        weight = name + ".weight"
        rows, columns = self.plan.specs[weight].shape
        count = scheme.blocks_per_row(columns)
        packed, scales = weight + ".packed", weight + ".scales"
        zeros = None if scheme.symmetric else weight + ".zeros"
        self.jobs.append(BlockJob(weight, packed, scales, scheme, zeros))
        self.graph.external(packed, "uint8", (rows, count, scheme.block_size * scheme.bits // 8))
        self.graph.external(scales, "float16", (rows, count))
        inputs = [x, packed, self._as_float(scales, "float16")]
        if zeros is not None:
            inputs.append(self.graph.external(zeros, "uint8", (rows, -(-count * scheme.bits // 8))))
        if bias:
            inputs += [""] * (5 - len(inputs)) + [self.vector(name + ".bias")]
        return self.graph.microsoft(
            "MatMulNBits",
            inputs,
            K=columns,
            N=rows,
            bits=scheme.bits,
            block_size=scheme.block_size,
            accuracy_level=self.plan.options.accuracy_level,
        )

    def _quantize_rows(self, x: str) -> tuple[str, str]:
        """Round activations to INT8 with one scale per row: (..., columns) -> uint8 about 128, (..., 1) float32.

        A scale per row, not one per tensor, because rows with outliers would cost all others their precision. The
        integers are unsigned since ONNX Runtime's product of signed by signed is ten times slower.
        """
        graph = self.graph
        largest = graph.node("ReduceMax", [graph.node("Abs", [x]), graph.constant([-1])], keepdims=1)  # (..., 1)
        floor = graph.constant(1e-30, "float32")  # a row of zeros must not divide by zero
        scale = graph.node("Mul", [graph.node("Max", [largest, floor]), graph.constant(1 / 127, "float32")])
        unit = graph.node("Div", [x, scale])
        zero = graph.constant(128, "uint8")
        return graph.node("QuantizeLinear", [unit, graph.constant(1.0, "float32"), zero]), scale

    def _channel_linear(self, quantized: str, row_scale: str, name: str) -> str:
        weight = name + ".weight"
        rows, columns = self.plan.specs[weight].shape
        stored, scale = weight + ".int8", weight + ".scale"
        self.jobs.append(ChannelJob(weight, stored, scale))
        graph = self.graph
        graph.external(stored, "int8", (columns, rows))
        graph.external(scale, "float32", (rows,))
        total = graph.node("MatMulInteger", [quantized, stored, graph.constant(128, "uint8")])
        return graph.node("Mul", [graph.node("Mul", [self.cast(total, "float32"), row_scale]), scale])
