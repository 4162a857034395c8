"""Filling data files: each weight read from the checkpoint in slices, quantised, and written in order.

Files are written front to back and never mapped, so that a full disk is an ordinary error.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from phisight.errors import CheckpointError
from phisight.export.checkpoint import Checkpoint, SourceTensor
from phisight.export.onnx_graph import ExternalTensor, GraphBuilder
from phisight.export.onnx_layers import ArrayJob, BlockJob, ChannelJob, FloatJob, WeightJob
from phisight.quant.blocks import Blocks, quantize_blocks, quantize_channels
from phisight.quant.packing import pack_matmul_nbits
from phisight.quant.scheme import BlockScheme, FloatScheme

__all__ = ["Progress", "write_embeddings", "write_graph"]

Progress = Callable[[int], None]
"""Called with the number of weights done since the last call."""

T = TypeVar("T")
R = TypeVar("R")
WORKERS = 2
"""Threads that quantise while one writes: NumPy releases the interpreter for them. More would hold more slices."""


def write_graph(
    graph: GraphBuilder, jobs: list[WeightJob], checkpoint: Checkpoint, directory: Path, progress: Progress
) -> None:
    """Write `<graph name>.onnx` and its data file into `directory`.

    Raises CheckpointError, naming the tensor, for weights that are not finite or that their scheme cannot hold.
    """
    with (directory / graph.data_file).open("wb") as file:
        for job in jobs:
            _write_job(file, graph.externals, job, checkpoint, progress)
    (directory / f"{graph.name}.onnx").write_bytes(graph.model().SerializeToString(deterministic=True))


def write_embeddings(
    source: SourceTensor, scheme: FloatScheme | BlockScheme, directory: Path, progress: Progress
) -> None:
    """Write the embedding table as .npy files, from which the host maps single rows.

    Floats: `embeddings.npy` (vocab, hidden). INT8 blocks: `embeddings.npy` (vocab, hidden) int8 and
    `embeddings.scales.npy` (vocab, blocks) float16; a row is `q * scale` block by block.
    Raises as `write_graph`.
    """
    rows, columns = source.shape
    if isinstance(scheme, FloatScheme):
        dtype = np.dtype(np.float32 if scheme.dtype == "f32" else np.float16)
        with _npy(directory / "embeddings.npy", dtype, (rows, columns)) as file, _naming(source.spec.name):
            for chunk in source.chunks():
                _write(file, _floats(chunk, dtype))
                progress(chunk.size)
        return
    scales = []
    with _npy(directory / "embeddings.npy", np.dtype(np.int8), (rows, columns)) as file, _naming(source.spec.name):
        for blocks in _parallel(lambda c: quantize_blocks(c, scheme), source.chunks()):
            q = blocks.q.reshape(len(blocks.q), -1)[:, :columns]
            _write(file, np.ascontiguousarray(q))
            scales.append(blocks.scale)
            progress(q.size)
    with _npy(directory / "embeddings.scales.npy", np.dtype(np.float16), (rows, scales[0].shape[1])) as file:
        _write(file, np.concatenate(scales))


def _write_job(
    file: BinaryIO,
    externals: dict[str, ExternalTensor],
    job: WeightJob,
    checkpoint: Checkpoint,
    progress: Progress,
) -> None:
    if isinstance(job, ArrayJob):
        _seek(file, externals[job.target])
        _write(file, job.array)
        return
    source = checkpoint.tensors[job.source]
    with _naming(job.source):
        match job:
            case FloatJob(_, target, dtype, transpose):
                _seek(file, externals[target])
                for chunk in source.column_chunks() if transpose else source.chunks():
                    _write(file, _floats(chunk.T if transpose else chunk, np.dtype(dtype)))
                    progress(chunk.size)
            case BlockJob(_, packed, scales, scheme):
                _seek(file, externals[packed])
                collected = []
                for data, scale in _parallel(_packer(scheme), source.chunks()):
                    _write(file, data)
                    collected.append(scale)
                    progress(len(scale) * source.shape[1])
                _seek(file, externals[scales])
                _write(file, np.concatenate(collected))
            case ChannelJob(_, weight, scale_name):
                parts = [quantize_channels(chunk) for chunk in source.chunks()]
                _seek(file, externals[weight])
                _write(file, np.concatenate([part.q for part in parts]).T)
                _seek(file, externals[scale_name])
                _write(file, np.concatenate([part.scale for part in parts]))
                progress(source.size)


@contextmanager
def _naming(tensor: str) -> Iterator[None]:
    """What is wrong with weights is said with the tensor's name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{tensor}: {error}") from error


def _floats(chunk: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """In the type of the file. Raises CheckpointError for what is not finite there."""
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(chunk, dtype)
    if not np.isfinite(converted).all():
        raise CheckpointError(
            f"weights reach {np.abs(chunk).max()}, which {dtype} cannot hold: "
            + ("the checkpoint is damaged" if dtype == np.float32 else "export to f32, or the checkpoint is damaged")
        )
    return converted


def _packer(scheme: BlockScheme) -> Callable[[NDArray[np.float32]], tuple[NDArray[np.uint8], NDArray[np.float16]]]:
    def pack(chunk: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        blocks: Blocks = quantize_blocks(chunk, scheme)
        return pack_matmul_nbits(blocks.q, scheme.bits), blocks.scale

    return pack


def _parallel(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on a few threads, in order, with no more than a few items in memory."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write(file: BinaryIO, array: NDArray[Any]) -> None:
    """The array's bytes, without a copy if they lie in order."""
    file.write(np.ascontiguousarray(array).data.cast("B"))


def _seek(file: BinaryIO, tensor: ExternalTensor) -> None:
    """Go forward to where the tensor starts, filling the gap with zeros."""
    gap = tensor.offset - file.seek(0, os.SEEK_END)
    file.write(bytes(gap))


def _npy(path: Path, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> BinaryIO:
    """A new .npy file (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html), header written."""
    file = path.open("wb")
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file
