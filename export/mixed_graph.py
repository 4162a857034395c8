"""A model directory in which one stage's graph and weights are another directory's, and all others the reference's.

    both graphs side by side -> the boundaries of the stage joined crosswise -> what no output needs any more is dropped

Weights stay where they are: the mixed graph names both data files, which are linked beside it. Stages of the decoder
are cut at the norm before each layer and before the head, where the sum of all layers so far goes through; the tower is
cut where the projector reads it. Whatever lies between two cuts is taken whole, so that scales which a method has
folded from one tensor into its neighbour stay together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from phisight.config import ModelConfig
from phisight.errors import InputError, PhisightError
from phisight.export.names import FINAL_NORM, PROJECTOR, decoder_layer
from phisight.manifest import FILE_NAME, Manifest

__all__ = ["GraphFile", "MixedModel"]

GraphFile = Literal["vision.onnx", "decoder.onnx"]
NORMS = ("layer_norm1.weight", "input_layernorm.weight")
EXTERNAL = onnx.TensorProto.EXTERNAL


@dataclass(frozen=True)
class MixedModel:
    """Two directories, and the accuracy levels at which they are run; None leaves that of the export."""

    reference: Path
    variant: Path
    config: ModelConfig
    reference_level: int | None
    variant_level: int | None

    def write(self, out: Path, file: GraphFile, taken: Container[str]) -> None:
        """Make `out`, a model directory whose stages in `taken` are the variant's.

        Stages are "tower" and "projector" of vision.onnx, "0", "1", ... (layers) and "head" of decoder.onnx. Raises
        InputError where the two graphs cannot be joined, PhisightError where `out` cannot be written.
        """
        ours = _Graph.read("reference", self.reference / file, self.reference_level)
        theirs = _Graph.read("variant", self.variant / file, self.variant_level)
        if ours.interface() != theirs.interface():
            raise InputError(f"{file} of {self.variant} computes in other types than that of {self.reference}")
        stages = ["tower", "projector"]
        if file == "decoder.onnx":
            stages = [*map(str, range(self.config.decoder.num_layers)), "head"]
        chosen = [theirs if stage in taken else ours for stage in stages]
        for stage, before, graph in zip(stages[1:], chosen, chosen[1:], strict=False):
            if before is not graph:
                graph.read_from(stage, before)
        outputs = {f"present.{i}.{kind}": chosen[i] for i in range(len(chosen) - 1) for kind in ("key", "value")}
        model = _pruned(ours, theirs, {**outputs, "logits": chosen[-1], "image_features": chosen[-1]})
        try:
            self._write(out, file, model)
        except OSError as error:
            raise PhisightError(f"{out} cannot be written: {error.strerror or error}") from None

    def _write(self, out: Path, file: GraphFile, model: onnx.ModelProto) -> None:
        out.mkdir(parents=True)
        manifest = Manifest.read(self.reference)
        for name in manifest.files:
            if name != file:
                _link(self.reference / name, out / name)
        for side, directory in (("reference", self.reference), ("variant", self.variant)):
            for data in directory.glob(f"{file}.data"):
                _link(data, out / f"{side}.{data.name}")
        (out / file).write_bytes(model.SerializeToString())
        shutil.copyfile(self.reference / FILE_NAME, out / FILE_NAME)
        Manifest(manifest.format, manifest.phisight, manifest.model, manifest.options, {}, manifest.tensors).write(out)


class _Graph:
    """A graph whose tensors all have names that begin with its side, but for inputs and outputs of the whole."""

    def __init__(self, side: str, model: onnx.ModelProto) -> None:
        self.side = side
        self.model = model
        graph = model.graph
        self.inputs = {each.name for each in graph.input}
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.initializers = {each.name: each for each in graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output if name}

    @classmethod
    def read(cls, side: str, path: Path, level: int | None) -> _Graph:
        """Raises InputError for a file that is no graph."""
        try:
            model = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # of several packages
            raise InputError(f"{path} cannot be read as ONNX ({error}): export the model again") from None
        graph = model.graph
        kept = {each.name for each in graph.input} | {""}

        def named(name: str) -> str:
            return name if name in kept else f"{side}/{name}"

        for node in graph.node:
            node.name = named(node.name)
            node.input[:] = map(named, node.input)
            node.output[:] = [name and f"{side}/{name}" for name in node.output]
            for attribute in node.attribute:
                if attribute.name == "accuracy_level" and level is not None:
                    attribute.i = level
        for tensor in graph.initializer:
            tensor.name = named(tensor.name)
            for entry in tensor.external_data if tensor.data_location == EXTERNAL else ():
                if entry.key == "location":
                    entry.value = f"{side}.{entry.value}"
        return cls(side, model)

    def interface(self) -> dict[str, int]:
        """Types of inputs and of the whole's outputs, by name."""
        graph = self.model.graph
        return {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)}

    def float_type(self) -> int:
        """Of what flows between the stages: that of the norms."""
        norms = (tensor.data_type for name, tensor in self.initializers.items() if name.endswith(NORMS))
        return next(norms, onnx.TensorProto.FLOAT)

    def read_from(self, stage: str, before: _Graph) -> None:
        """Let `stage` read what the stage before it gives in another graph, in this one's type. Raises InputError."""
        renamed = {}
        for mine, theirs in zip(self.boundary(stage), before.boundary(stage), strict=True):
            renamed[mine] = theirs
            if self.float_type() != before.float_type():
                renamed[mine] = f"{self.side}/{theirs}"
                cast = onnx.helper.make_node("Cast", [theirs], [renamed[mine]], to=self.float_type())
                self.producer[renamed[mine]] = cast
        readers = [self.first(stage)] if stage != "projector" else self.nodes
        for node in readers:
            node.input[:] = [renamed.get(name, name) for name in node.input]

    def boundary(self, stage: str) -> list[str]:
        """The tensors that `stage` reads from the one before it."""
        if stage != "projector":
            return list(self.first(stage).input[:2])  # the last product, and the sum of all before it
        node = self.first(stage)
        if node.op_type != "MatMulInteger":
            return [node.input[0]]
        unit = self.producer[node.input[0]].input[0]  # QuantizeLinear of the values over their scale
        return [self.producer[unit].input[0]]

    def first(self, stage: str) -> onnx.NodeProto:
        """The node that reads the stage's input. Raises InputError."""
        weight = {"head": FINAL_NORM, "projector": PROJECTOR[0] + ".weight"}.get(
            stage, f"{decoder_layer(int(stage))}input_layernorm.weight" if stage.isdigit() else stage
        )
        found = {f"{self.side}/{weight}{kind}" for kind in ("", ".packed", ".int8", "_quantized")}
        found |= {node.output[0] for node in self.nodes if node.op_type == "Cast" and node.input[0] in found}
        for node in self.nodes:
            if node.op_type != "Cast" and found & set(node.input):
                return node
        raise InputError(f"the graph of the {self.side} has no stage {stage}: it was not exported by phisight")


def _pruned(ours: _Graph, theirs: _Graph, chosen: dict[str, _Graph]) -> onnx.ModelProto:
    """One graph with the outputs of the chosen ones and what they need, each node behind those that it reads."""
    producers = {**ours.producer, **theirs.producer}
    outputs = [each.name for each in ours.model.graph.output]
    wanted = {f"{chosen[name].side}/{name}": name for name in outputs}
    order = list(_sorted(producers, list(wanted)))
    for node in order:
        node.input[:] = [wanted.get(name, name) for name in node.input]
        node.output[:] = [wanted.get(name, name) for name in node.output]
    used = {name for node in order for name in node.input}
    result = onnx.ModelProto()
    result.CopyFrom(ours.model)
    graph = result.graph
    initializers = {**ours.initializers, **theirs.initializers}
    for field, values in (
        ("node", order),
        ("initializer", [initializers[name] for name in initializers if name in used]),
    ):
        graph.ClearField(field)
        getattr(graph, field).extend(values)
    graph.ClearField("value_info")
    known = {(each.domain, each.version) for each in result.opset_import}
    result.opset_import.extend(each for each in theirs.model.opset_import if (each.domain, each.version) not in known)
    return result


def _sorted(producers: dict[str, onnx.NodeProto], wanted: list[str]) -> Iterator[onnx.NodeProto]:
    """Nodes that the wanted tensors need, each once and behind its own needs."""
    done: set[int] = set()
    stack = [(producers[name], False) for name in reversed(wanted) if name in producers]
    while stack:
        node, ready = stack.pop()
        if id(node) in done:
            continue
        if ready:
            done.add(id(node))
            yield node
            continue
        stack.append((node, True))
        stack += [(producers[name], False) for name in node.input if name in producers]


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk knows no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
