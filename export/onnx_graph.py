"""Building an ONNX graph node by node, with its weights in one file beside it.

The graph holds structure and small constants; weights are declared here and written by `phisight.export.onnx_writer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["DTYPES", "ExternalTensor", "GraphBuilder"]

OPSET = 20
"""The first with Gelu. ONNX Runtime's own operators (com.microsoft) have version 1."""

DTYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}

ALIGNMENT = 64 << 10
"""Where big tensors start: memory mapping on Windows works in steps of 64 KiB."""
BIG = 1 << 20


@dataclass(frozen=True)
class ExternalTensor:
    """A weight that lies in the data file: where, and as what."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class GraphBuilder:
    """Collects nodes, constants and external weights. Every method that adds something returns its name."""

    def __init__(self, name: str, data_file: str) -> None:
        self.name = name
        self.data_file = data_file
        self.externals: dict[str, ExternalTensor] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._end = 0
        self._count = 0

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input; strings name symbolic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, DTYPES[dtype], shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph output, which must be the name of a node's output."""
        self._outputs.append(helper.make_tensor_value_info(name, DTYPES[dtype], shape))
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] | int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node, return its first output. `outputs` are names, or how many to invent."""
        self._count += 1
        if isinstance(outputs, int):
            stem = f"{op}_{self._count}"
            outputs = [stem if i == 0 else f"{stem}_{i}" for i in range(outputs)]
        proto = helper.make_node(op, inputs, outputs, f"{op}_{self._count}", domain=domain, **attributes)
        self._nodes.append(proto)
        return next(name for name in outputs if name)

    def nodes(self, op: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs, return them all."""
        first = self.node(op, inputs, outputs=count, **attributes)
        return [first, *(f"{first}_{i}" for i in range(1, count))]

    def microsoft(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] | int = 1,
        **attributes: Any,
    ) -> str:
        """Add one of ONNX Runtime's own operators."""
        return self.node(op, inputs, outputs=outputs, domain="com.microsoft", **attributes)

    def choose(
        self,
        condition: str,
        then: Callable[[], Sequence[str]],
        otherwise: Callable[[], Sequence[str]],
        outputs: Sequence[tuple[str, str]],
    ) -> None:
        """Add an If for the bool scalar `condition`, with `outputs` of these names and dtypes.

        Each branch adds its nodes and returns the names of its results, in the order of the outputs.
        """
        dtypes = [dtype for _, dtype in outputs]
        branches = {
            "then_branch": self._branch("then", then, dtypes),
            "else_branch": self._branch("otherwise", otherwise, dtypes),
        }
        self.node("If", [condition], outputs=[name for name, _ in outputs], **branches)

    def _branch(self, name: str, build: Callable[[], Sequence[str]], dtypes: Sequence[str]) -> onnx.GraphProto:
        """A graph of its own for the nodes that `build` adds. It sees the names of the graph around it."""
        around, self._nodes = self._nodes, []
        results = build()
        nodes, self._nodes = self._nodes, around
        values = [
            helper.make_tensor_value_info(result, DTYPES[dtype], None)
            for result, dtype in zip(results, dtypes, strict=True)
        ]
        return helper.make_graph(nodes, name, [], values)

    def constant(self, value: NDArray[Any] | Sequence[float] | float, dtype: str = "int64") -> str:
        """A small constant inside the graph; equal ones are shared."""
        array = np.asarray(value, dtype=dtype)
        name = f"const_{dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if len(name) > 120:
            name = f"const_{len(self._constants)}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def external(self, name: str, dtype: str, shape: Sequence[int]) -> str:
        """Declare a weight in the data file."""
        tensor = ExternalTensor(name, dtype, tuple(shape), 0)
        step = ALIGNMENT if tensor.nbytes >= BIG else 64
        offset = -(-self._end // step) * step
        self.externals[name] = ExternalTensor(name, dtype, tuple(shape), offset)
        self._end = offset + tensor.nbytes
        return name

    def external_bytes(self) -> int:
        """Size of the data file."""
        return self._end

    def model(self) -> onnx.ModelProto:
        """The finished graph."""
        initializers = list(self._constants.values())
        for tensor in self.externals.values():
            proto = TensorProto(name=tensor.name, data_type=DTYPES[tensor.dtype], dims=tensor.shape)
            proto.data_location = TensorProto.EXTERNAL
            location = {"location": self.data_file, "offset": str(tensor.offset), "length": str(tensor.nbytes)}
            for key, value in location.items():
                proto.external_data.add(key=key, value=value)
            initializers.append(proto)
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="phisight")
