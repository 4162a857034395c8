"""An ONNX model directory's weights as GGUF files: the same numbers for llama.cpp, without the checkpoint.

    INT4 blocks -> Q4_0, INT8 blocks -> Q8_0 (blocks of 64 and 128 as several of 32 with the same scale), floats as they
    are; the tower, whatever it is stored as, -> F16

So two engines can be timed on identical weights. Of a few layers only, where the others' time is to be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from phisight.config import ModelConfig
from phisight.errors import InputError
from phisight.export.gguf_metadata import add_text_metadata, add_vision_metadata
from phisight.export.gguf_plan import GgufOptions, GgufPlan, PlannedTensor, to_kernel
from phisight.export.names import EMBEDDINGS, PATCH_EMBEDDING, POSITION_TABLE, TensorSpec, expected_tensors, gguf_name
from phisight.export.stored_tensors import OnnxTensors, StoredTensors, open_stored
from phisight.manifest import Manifest
from phisight.quant.blocks import Blocks, quantize_blocks
from phisight.quant.floats import to_float_type
from phisight.quant.packing import pack_q4_0, pack_q8_0
from phisight.quant.scheme import SCHEMES, BlockScheme, FloatScheme

__all__ = ["MMPROJ", "TEXT", "shallow_config", "transcribe"]

TEXT, MMPROJ = "model.gguf", "mmproj.gguf"
ROWS_AT_ONCE = 2048
MOST_PATCHES = 3600
BLOCK = 32
Rows = NDArray[np.intp]


def shallow_config(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with its first `layers` layers in decoder and tower, or all where it has no more."""
    decoder = replace(config.decoder, num_layers=min(layers, config.decoder.num_layers))
    vision = config.vision
    if vision is not None:  # the last layer is never used
        vision = replace(vision, num_layers=min(layers, vision.used_layers) + 1)
    return replace(config, decoder=decoder, vision=vision)


def transcribe(
    directory: Path, out: Path, *, layers: int | None = None, progress: Callable[[int], None] = lambda weights: None
) -> None:
    """Write `out`/model.gguf and, for a model with a tower, `out`/mmproj.gguf. `progress` counts weights.

    Raises ModelDirError, and InputError for blocks with zero points, which Q4_0 does not have.
    """
    manifest = Manifest.read(directory)
    config = manifest.model if layers is None else shallow_config(manifest.model, layers)
    if config.images is not None:  # llama.cpp would resize what has more patches than the model's budget
        config = replace(
            config, images=replace(config.images, max_patches=max(MOST_PATCHES, config.images.max_patches))
        )
    specs = [spec for spec in expected_tensors(config).values() if spec.part != "unused"]
    text = [_planned(spec, manifest) for spec in specs if spec.part not in ("vision", "projector")]
    vision = [_planned(spec, manifest) for spec in specs if spec.part in ("vision", "projector")]
    decoder = "Q4_0" if any(tensor.type == "Q4_0" for tensor in text) else "Q8_0"
    plan = GgufPlan(GgufOptions(decoder=decoder, vision="F16", onnx_vision="none"), text, vision, None, [])
    stored = open_stored(directory, manifest)
    writer = gguf.GGUFWriter(out / TEXT, "phi3")
    add_text_metadata(writer, directory, config, plan)
    _write(writer, text, manifest, stored, progress)
    if config.vision is not None:
        writer = gguf.GGUFWriter(out / MMPROJ, "clip")
        add_vision_metadata(writer, config, plan, config.vision)
        _write(writer, vision, manifest, stored, progress)


def _planned(spec: TensorSpec, manifest: Manifest) -> PlannedTensor:
    return PlannedTensor(gguf_name(spec.name), spec, _type(spec, manifest.tensors[spec.name].scheme))


def _type(spec: TensorSpec, label: str) -> str:
    scheme = SCHEMES[label]
    if len(spec.shape) == 1 or spec.name == POSITION_TABLE:
        return "F32"
    if spec.part in ("vision", "projector"):
        return "F16"
    if isinstance(scheme, FloatScheme):
        return scheme.dtype.upper()
    if not isinstance(scheme, BlockScheme) or not scheme.symmetric:
        raise InputError(
            f"{spec.name} is stored as {label}, which no type of GGUF holds: export it with symmetric blocks, or leave "
            "the other engine out"
        )
    return "Q4_0" if scheme.bits == 4 else "Q8_0"


def _write(
    writer: gguf.GGUFWriter,
    tensors: list[PlannedTensor],
    manifest: Manifest,
    stored: Mapping[str, StoredTensors],
    progress: Callable[[int], None],
) -> None:
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            parts = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in _bytes(tensor, manifest, stored)]
            writer.write_tensor_data(np.concatenate(parts))
            progress(tensor.spec.size)
    finally:
        writer.close()


def _bytes(
    tensor: PlannedTensor, manifest: Manifest, stored: Mapping[str, StoredTensors]
) -> Iterator[NDArray[np.generic]]:
    """The tensor's bytes, some rows at a time."""
    spec, entry = tensor.spec, manifest.tensors[tensor.spec.name]
    source, scheme = stored[spec.part], SCHEMES[entry.scheme]
    for start in range(0, spec.shape[0], ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, spec.shape[0]))
        if tensor.block_scheme is None:
            values = source.rows(spec, entry, rows)
            if spec.name == PATCH_EMBEDDING + ".weight":
                values = to_kernel(values)
            yield to_float_type(values, tensor.type)
            continue
        assert isinstance(scheme, BlockScheme)
        if spec.name == EMBEDDINGS or not isinstance(source, OnnxTensors):
            blocks = quantize_blocks(source.rows(spec, entry, rows), tensor.block_scheme)
        else:
            blocks = _of_32(source.blocks(spec, scheme, rows))
        yield pack_q4_0(blocks) if scheme.bits == 4 else pack_q8_0(blocks)


def _of_32(blocks: Blocks) -> Blocks:
    """Longer blocks as several of 32 with the same scale: the same numbers. (rows, blocks, size) each."""
    rows, count, size = blocks.q.shape
    times = size // BLOCK
    wanted = -(-blocks.columns // BLOCK)  # the last block may be padded beyond the row
    q = blocks.q.reshape(rows, count * times, BLOCK)[:, :wanted]
    return Blocks(np.ascontiguousarray(q), np.repeat(blocks.scale, times, axis=1)[:, :wanted], blocks.columns)
