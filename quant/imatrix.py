"""Importance matrices as llama.cpp's tools write and read them: how much each column of a matrix matters.

GGUF form (https://github.com/ggml-org/llama.cpp, tools/imatrix/imatrix.cpp): `general.type` is "imatrix"; keys
imatrix.datasets, imatrix.chunk_count and imatrix.chunk_size; for a weight NAME the float32 tensors NAME.in_sum2
(matrices, columns), sums of x^2, and NAME.counts (matrices, 1), how many inputs were summed. A weight has more than
one matrix only where experts are stacked.

The older .dat form, read only: int32 entries, for each an int32 length and the name, int32 chunks, int32 values and
the float32 values, sums of a mean for each chunk; at the end an int32 chunk count and the data set's length and name.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.gguf_file import GgufFile, GgufTensor
from phisight.quant.methods.base import InputStatistics

__all__ = ["CHUNK_SIZE", "ImportanceMatrix", "SquareSums"]

CHUNK_SIZE = 512
"""Tokens that llama.cpp calls a chunk."""
SUMS, COUNTS = ".in_sum2", ".counts"
KIND, DATASETS, CHUNKS, SIZE = "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class SquareSums:
    """Of one weight: `sums` (matrices, columns) float32 of x^2, and of how many inputs each, `counts` (matrices,)."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    @property
    def importance(self) -> NDArray[np.float32]:
        """The means (matrices x columns,), as quantisers take them: 1 where a matrix saw no input."""
        counted = self.counts[:, None] > 0
        divisor = np.where(counted, self.counts[:, None], np.float32(1))
        return np.where(counted, self.sums / divisor, np.float32(1)).astype(np.float32).reshape(-1)


@dataclass(frozen=True)
class ImportanceMatrix:
    """All weights by their GGUF names, and what they were measured with."""

    weights: Mapping[str, SquareSums]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = CHUNK_SIZE

    @classmethod
    def of(cls, statistics: Mapping[str, InputStatistics], datasets: tuple[str, ...]) -> ImportanceMatrix:
        """From the inputs' second moments, by GGUF names.

        Counts are whole numbers in such files: sums of token weights are rounded, which leaves the means as they are.
        """
        weights = {}
        for name, each in statistics.items():
            count = np.float32(max(1, round(each.count)))
            weights[name] = SquareSums(each.second_moment[None] * count, np.array([count]))
        most = max((float(each.counts[0]) for each in weights.values()), default=0.0)
        return cls(weights, datasets, -(-int(most) // CHUNK_SIZE))

    @classmethod
    def read(cls, path: Path) -> ImportanceMatrix:
        """Either form. Raises InputError for a file that is missing, damaged, or something else."""
        try:
            with path.open("rb") as file:
                magic = file.read(4)
            matrix = _read_gguf(path) if magic == b"GGUF" else _read_dat(path, path.read_bytes())
        except OSError as error:
            raise InputError(f"the importance matrix {path} cannot be read: {error.strerror or error}") from None
        for name, each in matrix.weights.items():
            if not (np.isfinite(each.sums).all() and np.isfinite(each.counts).all()):
                raise InputError(
                    f"the importance matrix {path} has values of {name} that are not finite: make it again"
                )
            if (each.sums < 0).any() or (each.counts < 0).any():
                raise InputError(f"the importance matrix {path} has negative values of {name}: make it again")
        return matrix

    def write(self, path: Path) -> None:
        """Write the GGUF form, under its name when it is complete. Raises InputError if the place cannot be written."""
        import gguf

        part = path.with_name(f"{path.name}.part")
        try:
            writer = gguf.GGUFWriter(part, "imatrix")
            writer.add_type("imatrix")
            writer.add_array(DATASETS, list(self.datasets))
            writer.add_uint32(CHUNKS, self.chunk_count)
            writer.add_uint32(SIZE, self.chunk_size)
            for name in sorted(self.weights):
                writer.add_tensor(name + SUMS, np.ascontiguousarray(self.weights[name].sums, np.float32))
                writer.add_tensor(name + COUNTS, self.weights[name].counts.astype(np.float32)[:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            part.replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}: choose another place") from None
        finally:
            part.unlink(missing_ok=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and values, hex, whatever form the file had."""
        state = hashlib.sha256()
        for name in sorted(self.weights):
            state.update(name.encode())
            state.update(self.weights[name].importance.astype("<f4").tobytes())
        return state.hexdigest()

    def columns(self, name: str, count: int) -> NDArray[np.float32] | None:
        """Importance of the `count` columns of a weight, or None for one that the file does not have.

        Raises InputError for another number of columns: the file is then of another model.
        """
        if (found := self.weights.get(name)) is None:
            return None
        if found.sums.shape != (1, count):
            raise InputError(
                f"the importance matrix has {found.sums.size} columns for {name}, the model {count}: "
                "give one made for this model"
            )
        return found.importance


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = GgufFile.read(path)
    if file.metadata.get(KIND) != "imatrix":
        kind = file.metadata.get(KIND, "model")
        raise InputError(f"{path} is a GGUF file of the type {kind!r}, wanted an importance matrix")
    weights = {}
    for tensor in file.tensors.values():
        if not tensor.name.endswith(SUMS):
            continue
        name = tensor.name.removesuffix(SUMS)
        if (counts := file.tensors.get(name + COUNTS)) is None:
            raise InputError(f"the importance matrix {path} has sums of {name}, but no counts: make it again")
        sums = _floats(path, tensor)
        if counts.size == 0 or counts.size != sums.size // tensor.shape[-1]:
            raise InputError(f"the importance matrix {path} has {counts.size} counts for {name}: make it again")
        weights[name] = SquareSums(sums.reshape(counts.size, -1), _floats(path, counts))
    if not weights:
        raise InputError(f"the importance matrix {path} holds no weight: make it again")
    datasets, chunks, size = (file.metadata.get(key) for key in (DATASETS, CHUNKS, SIZE))
    return ImportanceMatrix(
        weights,
        tuple(map(str, datasets)) if isinstance(datasets, list) else (),
        chunks if isinstance(chunks, int) else 0,
        size if isinstance(size, int) else CHUNK_SIZE,
    )


def _floats(path: Path, tensor: GgufTensor) -> NDArray[np.float32]:
    """A tensor's values, flat. Raises InputError for another type than F32."""
    if tensor.type_name != "F32":
        raise InputError(f"the importance matrix {path} has {tensor.name} as {tensor.type_name}, wanted F32")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.bytes), "<f4").astype(np.float32)


def _read_dat(path: Path, data: bytes) -> ImportanceMatrix:
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count < 0 or at + count > len(data):
            raise InputError(f"{path} is no importance matrix, or is cut short at byte {at}: give one of llama.cpp's")
        at += count
        return data[at - count : at]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    weights = {}
    for _ in range(integer()):
        try:
            name = take(integer()).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path} is no importance matrix: give one of llama.cpp's") from None
        chunks = integer()
        values = np.frombuffer(take(4 * integer()), "<f4").astype(np.float32)
        weights[name] = SquareSums(values[None], np.array([max(chunks, 1)], np.float32))
    if not weights:
        raise InputError(f"the importance matrix {path} holds no weight: make it again")
    if at == len(data):  # the oldest files end here
        return ImportanceMatrix(weights)
    chunk_count = integer()
    dataset = take(integer()).decode("utf-8", "replace") if at < len(data) else ""
    return ImportanceMatrix(weights, (dataset,) if dataset else (), chunk_count)
