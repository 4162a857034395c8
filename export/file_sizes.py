"""What a planned export weighs on disk, file by file, with nothing written but headers for a moment.

The same graphs and headers are built as for the export itself, so that sizes are exact, except where a checkpoint is
known by its configuration alone: of a tokenizer that is not there the size is assumed.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from phisight.config import ModelConfig
from phisight.export.checkpoint import Checkpoint, SourceTensor
from phisight.export.convert import COPIED
from phisight.export.gguf_directory import GgufNames, modelfile
from phisight.export.gguf_plan import GgufPlan
from phisight.export.gguf_writer import file_bytes
from phisight.export.int8_kv import int8_kv_graph
from phisight.export.names import EMBEDDINGS, expected_tensors
from phisight.export.onnx_decoder import build_decoder
from phisight.export.onnx_graph import GraphBuilder
from phisight.export.onnx_vision import build_vision
from phisight.export.plan import Plan
from phisight.manifest import FILE_NAME, INT8_KV_GRAPH, FileEntry, Manifest
from phisight.quant.scheme import BlockScheme

__all__ = ["file_sizes", "imagined_checkpoint"]

NOWHERE = Path(os.devnull)
"""A directory in which there is no file."""
NPY_HEADER = 128
"""Of a .npy file whose shape is not extraordinarily long."""
TOKENIZER_BYTES = 72
"""A token's share of tokenizer.json, about: the real one has 100352 tokens in some 7 MB."""
GGUF_TOKEN_BYTES = 48
"""A token's share of a GGUF header: its text, type and merge, with their lengths."""


def imagined_checkpoint(config: ModelConfig, directory: Path = NOWHERE) -> Checkpoint:
    """A checkpoint of this configuration without weights, for planning; `directory` may hold its tokenizer."""
    tensors = {name: SourceTensor(spec, "BF16", None) for name, spec in expected_tensors(config).items()}
    return Checkpoint(directory, config, tensors)


def file_sizes(checkpoint: Checkpoint, plan: Plan | GgufPlan) -> dict[str, int]:
    """Bytes of every file of the model directory, by name. Raises TokenizerError, as the export would."""
    sizes = _gguf_sizes(checkpoint, plan) if isinstance(plan, GgufPlan) else _onnx_sizes(checkpoint, plan)
    real = (checkpoint.directory / COPIED[0]).is_file()
    for name in COPIED if real else ():
        if (checkpoint.directory / name).is_file():
            sizes[name] = (checkpoint.directory / name).stat().st_size
    if not real:
        sizes[COPIED[0]] = TOKENIZER_BYTES * checkpoint.config.decoder.vocab_size
    manifest = Manifest(
        format="gguf" if isinstance(plan, GgufPlan) else "onnx",
        phisight=version("phisight"),
        model=checkpoint.config,
        options=plan.options.as_json(),
        files={name: FileEntry(size, "0" * 64) for name, size in sorted(sizes.items())},
        tensors=plan.entries(),
    )
    return sizes | {FILE_NAME: len(manifest.text().encode())}


def _onnx_sizes(checkpoint: Checkpoint, plan: Plan) -> dict[str, int]:
    config = checkpoint.config
    graph, _ = build_decoder(config.decoder, plan, "decoder.onnx.data")
    scheme, (rows, columns) = plan.schemes[EMBEDDINGS], plan.specs[EMBEDDINGS].shape
    sizes = _graph_sizes(graph)
    if plan.options.kv is not None:
        decoder = config.decoder
        ranges = np.zeros((decoder.num_layers, 2, decoder.num_kv_heads, decoder.head_dim), np.float32)
        sizes[INT8_KV_GRAPH] = int8_kv_graph(graph.model(), ranges).ByteSize()
    if isinstance(scheme, BlockScheme):
        sizes["embeddings.npy"] = NPY_HEADER + rows * columns
        sizes["embeddings.scales.npy"] = NPY_HEADER + rows * scheme.blocks_per_row(columns) * 2
    else:
        sizes["embeddings.npy"] = NPY_HEADER + scheme.stored_bytes((rows, columns))
    return sizes | (_vision_sizes(config, plan) if config.vision is not None else {})


def _gguf_sizes(checkpoint: Checkpoint, plan: GgufPlan) -> dict[str, int]:
    config = checkpoint.config
    names = GgufNames.of(plan.options, has_vision=config.vision is not None)
    if (checkpoint.directory / COPIED[0]).is_file():
        with tempfile.TemporaryDirectory(prefix="phisight-plan-") as scratch:
            text, vision = file_bytes(checkpoint, plan, Path(scratch))
    else:
        text = sum(tensor.nbytes for tensor in plan.text) + GGUF_TOKEN_BYTES * config.decoder.vocab_size
        vision = sum(tensor.nbytes for tensor in plan.vision)
    sizes = {names.text: text, "Modelfile": len(modelfile(names, config).encode())}
    if names.mmproj is not None:
        sizes[names.mmproj] = vision
    return sizes | (_vision_sizes(config, plan.onnx) if plan.onnx is not None else {})


def _vision_sizes(config: ModelConfig, plan: Plan) -> dict[str, int]:
    assert config.vision is not None
    graph, _ = build_vision(config.vision, config.decoder.hidden_size, plan, "vision.onnx.data")
    return _graph_sizes(graph)


def _graph_sizes(graph: GraphBuilder) -> dict[str, int]:
    return {graph.data_file: graph.external_bytes(), f"{graph.name}.onnx": graph.model().ByteSize()}
