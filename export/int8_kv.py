"""A second graph of the decoder whose KV cache is INT8, and the ranges of keys and values that it needs.

    the directory so far + built-in data -> largest |key| and |value| of each layer, head and channel -> scales
    decoder.onnx + scales -> decoder.kv-int8.onnx, which reads the same decoder.onnx.data

ONNX Runtime rounds a new position by scales that are in the graph, and never looks at what it rounds: they have to be
known beforehand. A channel has its own, since some channels of keys are many times larger than others
(Hooper et al., KVQuant, 2024, https://arxiv.org/abs/2401.18079). What exceeds its range is cut off.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from phisight.backends.ort import OrtDecoder, OrtVisionEncoder
from phisight.backends.ort_session import SessionSettings, integer_products
from phisight.cached_decoder import CachedDecoder
from phisight.export.calibration.data import CalibrationData
from phisight.export.checkpoint import Checkpoint
from phisight.export.output import OutputDirectory
from phisight.export.parallel import Progress
from phisight.manifest import INT8_KV_GRAPH
from phisight.sequence import ImageFeatures, splice
from phisight.threads import choose_threads

__all__ = ["KV_TOKENS", "int8_kv_graph", "kv_ranges", "write_int8_kv"]

KV_TOKENS = 4096
"""Positions of built-in data that are read."""
MARGIN = 1.1
"""Ranges are so much wider than what was seen: other data has larger values, and a cut costs more than a step."""
SMALLEST = 1e-6
"""A channel that was never used still needs a scale above zero."""
CHUNK = 256
KINDS = ("key", "value")


def write_int8_kv(checkpoint: Checkpoint, data: CalibrationData, output: OutputDirectory, progress: Progress) -> None:
    """Add the graph to a directory that is complete but for it. `progress` counts positions of the data.

    Opens the decoder, which takes the memory of running it. Raises EngineError.
    """
    ranges = kv_ranges(output.path, checkpoint, data, progress)
    graph = onnx.load(str(output.path / "decoder.onnx"), load_external_data=False)
    with output.open(INT8_KV_GRAPH) as file:
        file.write(int8_kv_graph(graph, ranges).SerializeToString(deterministic=True))


def kv_ranges(
    directory: Path, checkpoint: Checkpoint, data: CalibrationData, progress: Progress
) -> NDArray[np.float32]:
    """Largest absolute keys and values, (layers, 2, kv_heads, head_dim), that the data gives in an exported decoder."""
    config = checkpoint.config.decoder
    settings = SessionSettings(threads=choose_threads("auto").count, products=integer_products())
    pictured = any(sequence.images for sequence in data.sequences)
    encoder = OrtVisionEncoder(directory, settings, config.hidden_size) if pictured else None
    decoder = OrtDecoder(directory, settings, config)
    cached = CachedDecoder(decoder, config.context_length)
    shape = (config.num_layers, 2, config.num_kv_heads, -1, config.head_dim)
    ranges = np.zeros((*shape[:3], config.head_dim), np.float32)
    for sequence in data.sequences:
        features = [ImageFeatures(image.digest, encoder.encode(image)) for image in sequence.images] if encoder else []
        cached.forget()
        cached.prefill(
            splice(sequence.ids, features, vocab_size=config.vocab_size, hidden_size=config.hidden_size), chunk=CHUNK
        )
        seen = np.frombuffer(decoder.state_save(), np.float32).reshape(shape)
        np.maximum(ranges, np.maximum(seen.max(axis=3), -seen.min(axis=3)), out=ranges)
        progress(len(sequence))
    del cached, decoder, encoder
    gc.collect()  # their files are still to be renamed, which Windows does not do to open ones
    return ranges


def int8_kv_graph(graph: onnx.ModelProto, ranges: NDArray[np.float32]) -> onnx.ModelProto:
    """A causal decoder graph with an INT8 cache for values up to `ranges`, (layers, 2, kv_heads, head_dim)."""
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    names = [f"{when}.{i}.{kind}" for i in range(len(ranges)) for when in ("past", "present") for kind in KINDS]
    for value in (*result.graph.input, *result.graph.output):
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.INT8
    attentions = {node.input[3]: node for node in result.graph.node if node.op_type == "GroupQueryAttention"}
    for index, layer in enumerate(ranges):
        node = attentions[f"past.{index}.key"]
        node.input.extend([""] * (12 - len(node.input)))  # position ids, bias and sink, which the decoder has not
        for kind, largest in zip(KINDS, layer, strict=True):
            scale = np.maximum(largest * np.float32(MARGIN / 127), np.float32(SMALLEST))
            name = f"kv_scale.{index}.{kind}"
            # (1, kv_heads, 1, head_dim): each channel of each head has its own
            result.graph.initializer.append(numpy_helper.from_array(scale[None, :, None, :], name))
            node.input.append(name)
            node.attribute.append(helper.make_attribute(f"{kind[0]}_quant_type", "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    return result
