"""Writing GGUF files: the header by gguf's writer, then every tensor from the checkpoint in slices.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from phisight.export.checkpoint import Checkpoint, SourceTensor
from phisight.export.gguf_metadata import add_text_metadata, add_vision_metadata
from phisight.export.gguf_plan import BLOCK_SCHEMES, GgufPlan, PlannedTensor, to_kernel
from phisight.export.output import OutputDirectory, OutputFile
from phisight.export.parallel import Progress, in_parallel, naming
from phisight.export.quantized import QuantizedWeights
from phisight.quant.blocks import quantize_blocks
from phisight.quant.floats import to_float_type
from phisight.quant.ggml import GgmlQuantizer
from phisight.quant.packing import pack_q4_0, pack_q8_0

__all__ = ["check_types", "file_bytes", "file_header", "packer", "padded", "text_writer", "write_mmproj", "write_text"]

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


def check_types(plan: GgufPlan) -> None:
    """Raises EngineError if a type of the plan needs ggml's quantiser and llama-cpp-python is missing."""
    for type_name in sorted({tensor.type for tensor in (*plan.text, *plan.vision)}):
        packer(type_name)


def write_text(
    name: str,
    checkpoint: Checkpoint,
    plan: GgufPlan,
    output: OutputDirectory,
    progress: Progress,
    quantized: QuantizedWeights | None = None,
) -> None:
    """Write the text file. Weights that are `quantized` already are taken from there.

    Raises CheckpointError, TokenizerError, EngineError.
    """
    _write(name, text_writer(checkpoint, plan), plan.text, checkpoint, output, progress, quantized)


def write_mmproj(
    name: str, checkpoint: Checkpoint, plan: GgufPlan, output: OutputDirectory, progress: Progress
) -> None:
    """Write the mmproj of a checkpoint that has a tower. Raises CheckpointError, EngineError."""
    _write(name, _vision_writer(checkpoint, plan), plan.vision, checkpoint, output, progress)


def file_bytes(checkpoint: Checkpoint, plan: GgufPlan, scratch: Path) -> tuple[int, int]:
    """Sizes of the text file and of the mmproj (0 without a tower), nothing but headers being written into `scratch`.

    Raises TokenizerError.
    """
    text = file_header(text_writer(checkpoint, plan), plan.text, scratch / "text.header")
    sizes = [padded(len(text)) + sum(padded(tensor.nbytes) for tensor in plan.text), 0]
    if checkpoint.config.vision is not None:
        vision = file_header(_vision_writer(checkpoint, plan), plan.vision, scratch / "vision.header")
        sizes[1] = padded(len(vision)) + sum(padded(tensor.nbytes) for tensor in plan.vision)
    return sizes[0], sizes[1]


def text_writer(checkpoint: Checkpoint, plan: GgufPlan) -> gguf.GGUFWriter:
    """The text file's metadata. Raises TokenizerError."""
    writer = gguf.GGUFWriter(None, "phi3")
    add_text_metadata(writer, checkpoint.directory, checkpoint.config, plan)
    return writer


def _vision_writer(checkpoint: Checkpoint, plan: GgufPlan) -> gguf.GGUFWriter:
    vision = checkpoint.config.vision
    if vision is None:
        raise ValueError("a text-only checkpoint has no mmproj")
    writer = gguf.GGUFWriter(None, "clip")
    add_vision_metadata(writer, checkpoint.config, plan, vision)
    return writer


def padded(size: int) -> int:
    """Bytes up to where the next tensor may start."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write(
    name: str,
    writer: gguf.GGUFWriter,
    tensors: list[PlannedTensor],
    checkpoint: Checkpoint,
    output: OutputDirectory,
    progress: Progress,
    quantized: QuantizedWeights | None = None,
) -> None:
    with output.open(name) as file:
        progress(sum(tensor.spec.size for tensor in tensors[: file.units]))
        if file.units == 0:
            file.write(file_header(writer, tensors, output.path / f"{name}.header"))
        for tensor in file.unwritten(tensors):
            file.pad_to(padded(file.position))
            with naming(tensor.spec.name):
                _write_tensor(file, tensor, checkpoint.tensors[tensor.spec.name], progress, quantized)
        file.pad_to(padded(file.position))


def file_header(writer: gguf.GGUFWriter, tensors: list[PlannedTensor], scratch: Path) -> bytes:
    """Metadata and tensor table as bytes, by way of a small file, since the writer writes to paths only."""
    for tensor in tensors:
        dtype = gguf.GGMLQuantizationType[tensor.type]
        # The element type is not looked at where the stored type is given, as long as it is not uint8.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, dtype)
    try:
        writer.write_header_to_file(scratch)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)


def _write_tensor(
    file: OutputFile,
    tensor: PlannedTensor,
    source: SourceTensor,
    progress: Progress,
    quantized: QuantizedWeights | None,
) -> None:
    if len(tensor.shape) == 4:
        file.write_array(to_float_type(to_kernel(source.load()), tensor.type))
        progress(source.size)
        return
    if quantized is not None and (scheme := tensor.block_scheme) and source.spec.name in quantized:
        for blocks in quantized.blocks(source.spec.name, source.shape[1], scheme):
            file.write_array(pack_q4_0(blocks) if scheme.bits == 4 else pack_q8_0(blocks))
            progress(len(blocks.q) * source.shape[1])
        return
    if quantized is not None and (vector := quantized.vector(source.spec.name)) is not None:
        file.write_array(to_float_type(vector, tensor.type))
        progress(source.size)
        return
    pack = packer(tensor.type, tensor.importance)
    for count, packed in in_parallel(lambda chunk: (chunk.size, pack(chunk)), source.chunks()):
        file.write_array(packed)
        progress(count)


def packer(
    type_name: str, importance: NDArray[np.float32] | None = None
) -> Callable[[NDArray[np.float32]], NDArray[np.generic]]:
    """Rows of float32 -> the bytes of the type. INT4 and INT8 come from the same blocks as in ONNX files.

    `importance` (columns,) weighs the errors of the types that ggml packs.
    """
    match type_name:
        case "F32" | "F16" | "BF16":
            return lambda rows: to_float_type(rows, type_name)
        case "Q4_0":
            return lambda rows: pack_q4_0(quantize_blocks(rows, BLOCK_SCHEMES["Q4_0"]))
        case "Q8_0":
            return lambda rows: pack_q8_0(quantize_blocks(rows, BLOCK_SCHEMES["Q8_0"]))
        case _:
            quantizer = GgmlQuantizer(type_name)
            return lambda rows: quantizer.quantize(rows, importance)
