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
from phisight.quant.blocks import Blocks, quantize_blocks, quantize_channels
from phisight.quant.floats import to_float_type
from phisight.quant.scheme import BlockScheme, FloatScheme, FloatType

__all__ = ["write_embeddings", "write_graph"]

FLOAT_TYPES: dict[FloatType, type[np.floating]] = {"f32": np.float32, "f16": np.float16}
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
        progress(sum(_weights(job, checkpoint) for job in jobs[: file.units]))
        for job in file.unwritten(jobs):
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
    dtype = np.dtype(np.int8 if isinstance(scheme, BlockScheme) else FLOAT_TYPES[scheme.dtype])
    scales: list[NDArray[np.float16]] = []
    with _npy(output, "embeddings.npy", dtype, (rows, columns)) as file, naming(source.spec.name):
        progress(source.size * file.units)
        for table in file.unwritten([source]):
            if isinstance(scheme, FloatScheme):
                for chunk in table.chunks():
                    file.write_array(to_float_type(chunk, FLOAT_NAMES[dtype.name]))
                    progress(chunk.size)
                continue
            for blocks in _in_blocks(table, scheme):
                q = blocks.q.reshape(len(blocks.q), -1)[:, :columns]
                file.write_array(np.ascontiguousarray(q))
                scales.append(blocks.scale)
                progress(q.size)
    if isinstance(scheme, FloatScheme):
        return
    shape = (rows, scheme.blocks_per_row(columns))
    with _npy(output, "embeddings.scales.npy", np.dtype(np.float16), shape) as file, naming(source.spec.name):
        for table in file.unwritten([source]):
            # Only where a kill came between the two files are they computed once more.
            file.write_array(np.concatenate(scales or [blocks.scale for blocks in _in_blocks(table, scheme)]))


def _in_blocks(source: SourceTensor, scheme: BlockScheme) -> Iterator[Blocks]:
    return in_parallel(lambda chunk: quantize_blocks(chunk, scheme), source.chunks())


def _weights(job: WeightJob, checkpoint: Checkpoint) -> int:
    return 0 if isinstance(job, ArrayJob) else checkpoint.tensors[job.source].size


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
    """A .npy file (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html), header written."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with output.open(name) as file:
        if file.units == 0:
            np.lib.format.write_array_header_1_0(file, header)
        yield file
