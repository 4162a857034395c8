"""Small models to measure a machine with: a large model's graphs and layouts, few layers, weights repeated.

Kernels take the same time whatever the weights are, so a piece of random ones is written again and again: nothing is
quantised, and a model of 100 MB is there in a fraction of a second.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from phisight.config import DecoderConfig, ModelConfig, VisionConfig
from phisight.export.file_sizes import imagined_checkpoint
from phisight.export.gguf_plan import GgufOptions, PlannedTensor, make_gguf_plan
from phisight.export.gguf_types import PRESETS, fitting_type
from phisight.export.gguf_writer import file_header, packer, padded, text_writer
from phisight.export.onnx_decoder import build_decoder
from phisight.export.onnx_graph import ExternalTensor, GraphBuilder
from phisight.export.onnx_layers import ArrayJob, WeightJob
from phisight.export.onnx_vision import build_vision
from phisight.export.plan import ExportOptions, make_plan
from phisight.export.synth import synthetic_tokenizer

__all__ = ["probe_bytes", "probe_config", "write_gguf_probe", "write_onnx_probe"]

DECODER_WEIGHTS = 400 << 20
TOWER_WEIGHTS = 64 << 20
"""Layers are added up to about so many weights, or to the model's depth; widths stay, since they decide how fast a
matrix is. One layer of the 15B model is its probe."""
VOCABULARY = 1024
POSITIONS = 2048
PIECE = 1 << 20
ROWS = 64
"""Of a matrix that is quantised for real, then repeated."""


def probe_config(config: ModelConfig) -> ModelConfig:
    """The first layers, with a small vocabulary, which are measured in a moment; a small model is its own probe."""
    d, v = config.decoder, config.vision
    d = replace(
        d,
        num_layers=min(d.num_layers, max(1, DECODER_WEIGHTS // _layer_weights(d))),
        vocab_size=min(d.vocab_size, VOCABULARY),
        context_length=min(d.context_length, POSITIONS),
    )
    if v is not None:
        v = replace(v, num_layers=1 + max(1, min(v.used_layers, TOWER_WEIGHTS // _tower_layer_weights(v))))
    generation = replace(config.generation, eos_token_ids=(d.vocab_size - 1,))
    return replace(config, decoder=d, vision=v, generation=generation)


def write_onnx_probe(config: ModelConfig, options: ExportOptions, out: Path) -> None:
    """Fill the empty directory `out` with what ONNX Runtime reads of a model of this configuration."""
    plan = make_plan(config, options)
    _write_graph(*build_decoder(config.decoder, plan, "decoder.onnx.data"), out)
    if config.vision is not None:
        _write_graph(*build_vision(config.vision, config.decoder.hidden_size, plan, "vision.onnx.data"), out)
    shape = (config.decoder.vocab_size, config.decoder.hidden_size)
    np.save(out / "embeddings.npy", np.resize(_noise(), shape).astype(np.float16))


def write_gguf_probe(config: ModelConfig, options: GgufOptions, out: Path) -> None:
    """Write `model.gguf` for a text-only configuration into the empty directory `out`. Raises EngineError."""
    tokenizer = synthetic_tokenizer(config.decoder.vocab_size)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    checkpoint = imagined_checkpoint(config, out)
    plan = make_gguf_plan(checkpoint, _plain(options, config))
    with (out / "model.gguf").open("wb") as file:
        header = file_header(text_writer(checkpoint, plan), plan.text, out / "header")
        file.write(header.ljust(padded(len(header)), b"\0"))
        for tensor in plan.text:
            file.write(_repeated(tensor).ljust(padded(tensor.nbytes), b"\0"))


def probe_bytes(config: ModelConfig, options: ExportOptions | GgufOptions) -> int:
    """Of weights that a decoding step of the probe reads."""
    if isinstance(options, GgufOptions):
        entries = make_gguf_plan(imagined_checkpoint(config), _plain(options, config)).entries()
    else:
        entries = make_plan(config, options).entries()
    return sum(entry.bytes for entry in entries.values() if entry.part in ("decoder", "head"))


def _plain(options: GgufOptions, config: ModelConfig) -> GgufOptions:
    """With the preset's usual type in the attention's input: a preset gives more bits to first and last layers, and of
    few layers all are."""
    usual = PRESETS[options.decoder][0]
    names = [f"blk.{layer}.attn_qkv.weight" for layer in range(config.decoder.num_layers)]
    chosen = fitting_type(usual, config.decoder.hidden_size)
    attention = tuple((name, chosen) for name in names)
    return replace(options, overrides=(*options.overrides, *attention), imatrix=None)


def _repeated(tensor: PlannedTensor) -> bytes:
    """Some rows in the tensor's type, as often as it has them."""
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32).tobytes()
    rows, columns = min(ROWS, tensor.shape[0]), tensor.shape[1]
    piece = packer(tensor.type)(np.resize(_noise(), (rows, columns))).tobytes()
    return (piece * -(-tensor.nbytes // len(piece)))[: tensor.nbytes]


def _write_graph(graph: GraphBuilder, jobs: list[WeightJob], out: Path) -> None:
    computed = {job.target: job.array for job in jobs if isinstance(job, ArrayJob)}
    with (out / graph.data_file).open("wb") as file:
        for tensor in graph.externals.values():
            file.write(bytes(tensor.offset - file.tell()))
            if tensor.name in computed:
                file.write(computed[tensor.name].tobytes())
            else:
                _fill(file, tensor)
    (out / f"{graph.name}.onnx").write_bytes(graph.model().SerializeToString())


def _fill(file: BinaryIO, tensor: ExternalTensor) -> None:
    """Integers of all values; floats about 0, norms about 1, and scales that keep values small."""
    if tensor.dtype in ("int8", "uint8"):
        piece = np.random.default_rng(0).integers(0, 256, PIECE, np.uint8).tobytes()
    elif tensor.name.endswith((".scales", ".scale")) or "norm" in tensor.name:
        value = 1.0 if "norm" in tensor.name else 1e-3
        piece = np.full(min(PIECE, tensor.nbytes), value, tensor.dtype).tobytes()
    else:
        piece = _noise().astype(tensor.dtype).tobytes()
    whole, rest = divmod(tensor.nbytes, len(piece))
    for _ in range(whole):
        file.write(piece)
    file.write(piece[:rest])


def _noise() -> NDArray[np.float32]:
    """Small values about 0, the same each time."""
    return np.random.default_rng(0).standard_normal(PIECE, np.float32) * np.float32(0.02)


def _layer_weights(d: DecoderConfig) -> int:
    return d.hidden_size * (d.qkv_size + d.hidden_size + 3 * d.intermediate_size)


def _tower_layer_weights(v: VisionConfig) -> int:
    return 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
