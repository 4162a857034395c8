"""The first layers of an exported ONNX model, as a directory of its own: graphs anew, weights where they are.

Times of two depths tell what a layer takes and what all the rest: see `phisight bench`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import onnx

from phisight.errors import ModelDirError
from phisight.export.names import expected_tensors
from phisight.export.onnx_decoder import build_decoder
from phisight.export.onnx_graph import GraphBuilder
from phisight.export.onnx_vision import build_vision
from phisight.export.plan import ExportOptions, Plan
from phisight.export.transcription import shallow_config
from phisight.manifest import Manifest
from phisight.quant.scheme import SCHEMES

__all__ = ["write_shallow"]

LINKED = ("decoder.onnx.data", "vision.onnx.data", "embeddings.npy", "embeddings.scales.npy")


def write_shallow(directory: Path, out: Path, layers: int) -> None:
    """Fill the empty directory `out`. Data files are linked, or copied where `out` is on another disk.

    It holds what the two engines read, not a manifest. Raises ModelDirError for graphs that are not this exporter's.
    """
    manifest = Manifest.read(directory)
    config = shallow_config(manifest.model, layers)
    specs = expected_tensors(config)
    schemes = {name: SCHEMES[manifest.tensors[name].scheme] for name, spec in specs.items() if spec.part != "unused"}
    plan = Plan(_options(manifest), specs, schemes)
    graph, _ = build_decoder(config.decoder, plan, "decoder.onnx.data")
    _write(graph, directory, out)
    if config.vision is not None:
        graph, _ = build_vision(config.vision, config.decoder.hidden_size, plan, "vision.onnx.data")
        _write(graph, directory, out)
    for name in LINKED:
        if (directory / name).is_file():
            _link(directory / name, out / name)


def _options(manifest: Manifest) -> ExportOptions:
    """Those that shape a graph."""
    names = {"decoder", "vision", "block_size", "head", "accuracy_level"}
    chosen = {name: value for name, value in manifest.options.items() if name in names}
    float_type = manifest.options.get("float", "f32")
    return ExportOptions(
        **chosen,  # type: ignore[arg-type]  # the class checks each value
        float_type="f16" if float_type == "f16" else "f32",
        image_attention=manifest.image_attention,
    )


def _write(graph: GraphBuilder, directory: Path, out: Path) -> None:
    """The graph with its weights where the full graph's are."""
    path = directory / f"{graph.name}.onnx"
    full = onnx.load(path, load_external_data=False).graph
    places = {
        each.name: {entry.key: entry.value for entry in each.external_data}
        for each in full.initializer
        if each.external_data
    }
    for name, tensor in graph.externals.items():
        if name not in places or int(places[name]["length"]) != tensor.nbytes:
            raise ModelDirError(f"{path} has no weight {name} of {tensor.nbytes} bytes: export it again")
        graph.externals[name] = replace(tensor, offset=int(places[name]["offset"]))
    (out / path.name).write_bytes(graph.model().SerializeToString(deterministic=True))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
