"""Filling data files: each weight read from the checkpoint in slices, quantised, and written in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from phisight.export.checkpoint import Checkpoint, SourceTensor
from phisight.export.onnx_graph import ExternalTensor, GraphBuilder
from phisight.export.onnx_layers import ArrayJob, BlockJob, ChannelJob, FloatJob, WeightJob
from phisight.export.output import OutputDirectory, OutputFile
from phisight.export.parallel import Progress, in_parallel, naming
from phisight.export.quantized import PackedRows, QuantizedWeights
from phisight.quant.blocks import quantize_blocks, quantize_channels
from phisight.quant.floats import to_float_type
from phisight.quant.scheme import BlockScheme, FloatScheme

__all__ = ["write_embeddings", "write_graph"]

FLOAT_NAMES = {"float32": "F32", "float16": "F16"}


def write_graph(
    graph: GraphBuilder,
    jobs: list[WeightJob],
    checkpoint: Checkpoint,
    output: OutputDirectory,
    progress: Progress,
    quantized: QuantizedWeights | None = None,
) -> None:
    """Write `<graph name>.onnx` and its data file. Weights that are `quantized` already are taken from there.

    Raises CheckpointError, naming the tensor, for weights that are not finite or that their scheme cannot hold.
    """
    with output.open(graph.data_file) as file:
        for job in jobs:
            _write_job(file, graph.externals, job, checkpoint, progress, quantized)
    with output.open(f"{graph.name}.onnx") as file:
        file.write(graph.model().SerializeToString(deterministic=True))


def write_embeddings(
    source: SourceTensor, scheme: FloatScheme | BlockScheme, output: OutputDirectory, progress: Progress
) -> None:
    """Write the embedding table as .npy files, from which the host reads single rows.

    Floats: `embeddings.npy` (vocab, hidden). INT8 blocks: `embeddings.npy` (vocab, hidden) int8 and
    `embeddings.scales.npy` (vocab, blocks) float16; a row is `q * scale` block by block.
    Raises as `write_graph`.
    """
    rows, columns = source.shape
    if isinstance(scheme, FloatScheme):
        dtype = np.dtype(np.float32 if scheme.dtype == "f32" else np.float16)
        with _npy(output, "embeddings.npy", dtype, (rows, columns)) as file, naming(source.spec.name):
            for chunk in source.chunks():
                file.write_array(to_float_type(chunk, FLOAT_NAMES[dtype.name]))
                progress(chunk.size)
        return
    scales = []
    with _npy(output, "embeddings.npy", np.dtype(np.int8), (rows, columns)) as file, naming(source.spec.name):
        for blocks in in_parallel(lambda c: quantize_blocks(c, scheme), source.chunks()):
            q = blocks.q.reshape(len(blocks.q), -1)[:, :columns]
            file.write_array(np.ascontiguousarray(q))
            scales.append(blocks.scale)
            progress(q.size)
    with _npy(output, "embeddings.scales.npy", np.dtype(np.float16), (rows, scales[0].shape[1])) as file:
        file.write_array(np.concatenate(scales))


def _write_job(
    file: OutputFile,
    externals: dict[str, ExternalTensor],
    job: WeightJob,
    checkpoint: Checkpoint,
    progress: Progress,
    quantized: QuantizedWeights | None,
) -> None:
    if isinstance(job, ArrayJob):
        file.pad_to(externals[job.target].offset)
        file.write_array(job.array)
        return
    source = checkpoint.tensors[job.source]
    with naming(job.source):
        match job:
            case FloatJob(_, target, dtype, transpose):
                file.pad_to(externals[target].offset)
                vector = None if quantized is None else quantized.vector(job.source)
                chunks = source.column_chunks() if transpose else source.chunks()
                for chunk in chunks if vector is None else (vector,):
                    file.write_array(to_float_type(chunk.T if transpose else chunk, FLOAT_NAMES[dtype]))
                    progress(chunk.size)
            case BlockJob(_, packed, scales, scheme, zeros):
                file.pad_to(externals[packed].offset)
                scale_rows, zero_rows = [], []
                if quantized is not None and job.source in quantized:
                    parts = quantized.packed(job.source)
                else:
                    parts = in_parallel(_packer(scheme), source.chunks())
                for rows in parts:
                    file.write_array(rows.data)
                    scale_rows.append(rows.scale)
                    if rows.zero is not None:
                        zero_rows.append(rows.zero)
                    progress(len(rows.scale) * source.shape[1])
                file.pad_to(externals[scales].offset)
                file.write_array(np.concatenate(scale_rows))
                if zeros is not None:
                    file.pad_to(externals[zeros].offset)
                    file.write_array(np.concatenate(zero_rows))
            case ChannelJob(_, weight, scale_name):
                channels = [quantize_channels(chunk) for chunk in source.chunks()]
                file.pad_to(externals[weight].offset)
                file.write_array(np.concatenate([part.q for part in channels]).T)
                file.pad_to(externals[scale_name].offset)
                file.write_array(np.concatenate([part.scale for part in channels]))
                progress(source.size)


def _packer(scheme: BlockScheme) -> Callable[[NDArray[np.float32]], PackedRows]:
    return lambda chunk: PackedRows.of(quantize_blocks(chunk, scheme), scheme.bits)


@contextmanager
def _npy(
    output: OutputDirectory, name: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> Iterator[OutputFile]:
    """A new .npy file (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html), header written."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with output.open(name) as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file
