"""The header of a GGUF file: metadata and where each tensor lies, with every number checked before it is believed.

    magic, version 3, number of tensors, number of keys
    (key, type, value) ...
    (name, dimensions, type, offset) ...
    padding to the alignment, then the tensors' data

Nothing here reads the data. Files come from anywhere, and llama.cpp and gguf-py trust much of what they say: so a
count or a length is compared with what is left of the file before memory is taken for it.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; sizes of blocks: ggml's ggml-common.h.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phisight.errors import ModelDirError

__all__ = ["TENSOR_TYPES", "GgufFile", "GgufTensor", "MetadataValue", "TensorType"]

MetadataValue: TypeAlias = bool | int | float | str | list[str] | NDArray[Any]
"""A value of the metadata; an array of numbers or booleans is a numpy array of its own width."""

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MOST_HEADER_BYTES = 128 << 20
"""A vocabulary of 100352 tokens with its merges takes 5 MB."""
MOST_DIMENSIONS = 4
LONGEST_TENSOR_NAME = 63
MOST_ELEMENTS = 2**63 - 1

STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""Number of a metadata type -> numpy's name for it."""


@dataclass(frozen=True)
class TensorType:
    """How weights are stored: `block_bytes` for each `block_size` weights of a row."""

    name: str
    block_size: int
    block_bytes: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: TensorType("I8", 1, 1),
    25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4),
    27: TensorType("I64", 1, 8),
    28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
    42: TensorType("Q2_0", 64, 18),
}
"""By ggml's number. Those left out were given up by ggml, or are for sums under way (Q8_1, Q8_K), never in files."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, still on disk. `shape` is in numpy's order: rows, columns. `offset` is where it lies in the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    bytes: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """A checked header. `widths` has numpy's name of the type of each value that is one number, such as `<u4`."""

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GgufTensor]
    widths: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> GgufFile:
        """Read and check the header of a whole, little-endian file of version 3.

        Raises ModelDirError for a file that is missing, damaged, cut short, or one part of a model split in several.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                header = _Header(path, file, os.fstat(file.fileno()).st_size)
                return header.read()
        except OSError as error:
            raise ModelDirError(f"{path} cannot be read ({error.strerror or error}): give a GGUF file") from None


class _Header:
    """One pass over a header."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._position = 0
        self._widths: dict[str, str] = {}

    def read(self) -> GgufFile:
        if self._size < len(MAGIC) or self._take(len(MAGIC), "the magic") != MAGIC:
            raise ModelDirError(f"{self._path} does not begin with GGUF: it is not a GGUF file, or its download failed")
        version = self._integer("<I", "the version")
        if version != VERSION:
            kind = "a big-endian file" if version == VERSION << 24 else f"a file of GGUF version {version}"
            raise ModelDirError(
                f"{self._path} is {kind}, supported is version {VERSION}, little-endian: convert the model again"
            )
        num_tensors = self._integer("<Q", "the number of tensors")
        num_keys = self._integer("<Q", "the number of metadata keys")
        self._check_count(num_keys, 8 + 4 + 1, "metadata keys")
        metadata = self._metadata(num_keys)
        if (parts := metadata.get("split.count", 1)) != 1:
            raise ModelDirError(
                f"{self._path} is part of a model in {parts} files: join them first with llama-gguf-split --merge"
            )
        self._check_count(num_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        tensors = self._tensors(num_tensors, self._alignment(metadata))
        return GgufFile(self._path, metadata, tensors, self._widths)

    def _metadata(self, count: int) -> dict[str, MetadataValue]:
        metadata: dict[str, MetadataValue] = {}
        for number in range(count):
            key = self._string(f"metadata key {number}")
            if not key or key in metadata:
                raise self._damaged(f"metadata key {number} is {key!r}, wanted a name that comes once")
            metadata[key] = self._value(key)
        return metadata

    def _value(self, key: str) -> MetadataValue:
        type_ = self._integer("<I", f"the type of {key}")
        if type_ == STRING:
            return self._string(key)
        if type_ != ARRAY:
            value: MetadataValue = self._numbers(type_, 1, key)[0].item()
            self._widths[key] = SCALARS[type_]
            return value
        type_ = self._integer("<I", f"the type of {key}")
        count = self._integer("<Q", f"the length of {key}")
        if type_ != STRING:
            return self._numbers(type_, count, key)
        self._check_count(count, 8, f"strings in {key}")
        return [self._string(key) for _ in range(count)]

    def _numbers(self, type_: int, count: int, key: str) -> NDArray[Any]:
        if type_ not in SCALARS:
            raise self._damaged(f"{key} is of type {type_}, which GGUF does not have here")
        dtype = np.dtype(SCALARS[type_])
        self._check_count(count, dtype.itemsize, f"values in {key}")
        data = self._take(count * dtype.itemsize, key)
        if type_ == 7:
            return np.frombuffer(data, np.uint8).astype(np.bool_)  # a byte that numpy calls bool must be 0 or 1
        return np.frombuffer(data, dtype)

    def _alignment(self, metadata: dict[str, MetadataValue]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, wanted a power of two")
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        entries = [self._tensor(number, alignment) for number in range(count)]
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for entry in entries:
            if entry.name in tensors:
                raise self._damaged(f"tensor {entry.name} is there twice")
            tensor = GgufTensor(entry.name, entry.shape, entry.type_name, start + entry.offset, entry.bytes)
            if tensor.offset + tensor.bytes > self._size:
                raise self._damaged(
                    f"tensor {tensor.name} ends at byte {tensor.offset + tensor.bytes}, the file at {self._size}"
                )
            tensors[tensor.name] = tensor
        end = start
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._damaged(f"tensor {tensor.name} begins at byte {tensor.offset}, inside another one")
            end = tensor.offset + tensor.bytes
        return tensors

    def _tensor(self, number: int, alignment: int) -> GgufTensor:
        """A tensor's entry, with its offset from the start of the data."""
        name = self._string(f"the name of tensor {number}")
        if not name or len(name.encode()) > LONGEST_TENSOR_NAME:
            raise self._damaged(f"the name of tensor {number} is {name!r}, wanted 1 to {LONGEST_TENSOR_NAME} bytes")
        dimensions = self._integer("<I", f"the dimensions of {name}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions, wanted 1 to {MOST_DIMENSIONS}")
        shape = tuple(self._integer("<Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
        if not 1 <= math.prod(shape) <= MOST_ELEMENTS:
            raise self._damaged(f"tensor {name} has the shape {list(shape)}")
        number_of_type = self._integer("<I", f"the type of {name}")
        type_ = TENSOR_TYPES.get(number_of_type)
        if type_ is None:
            raise ModelDirError(
                f"{self._path}: tensor {_printable(name)} is of ggml type {number_of_type}, which is not known here: "
                "update phisight, or use a file of a common type such as Q4_0 or Q4_K_M"
            )
        if shape[-1] % type_.block_size:
            raise self._damaged(f"tensor {name} has rows of {shape[-1]}, not a multiple of {type_.name}'s block")
        offset = self._integer("<Q", f"the offset of {name}")
        if offset % alignment:
            raise self._damaged(f"tensor {name} has the offset {offset}, not a multiple of {alignment}")
        bytes_ = math.prod(shape) // type_.block_size * type_.block_bytes
        return GgufTensor(name, shape, type_.name, offset, bytes_)

    def _string(self, what: str) -> str:
        length = self._integer("<Q", f"the length of {what}")
        data = self._take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from None

    def _integer(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form), what))[0]
        return value

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        left = min(self._size, MOST_HEADER_BYTES) - self._position
        if count * least_bytes > left:
            raise self._damaged(f"it declares {count} {what}, more than fit into what is left of it")

    def _take(self, count: int, what: str) -> bytes:
        end = self._position + count
        if end > self._size:
            raise self._damaged(f"{what} would end at byte {end}, the file ends at {self._size}")
        if end > MOST_HEADER_BYTES:
            raise self._damaged(f"the header does not end within {MOST_HEADER_BYTES} bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise self._damaged(f"it became shorter while {what} was read")
        self._position = end
        return data

    def _damaged(self, what: str) -> ModelDirError:
        return ModelDirError(f"{self._path} is damaged or cut short: {_printable(what)}: download or export it again")


def _printable(text: str) -> str:
    """Names in a damaged file hold anything; a message is one line."""
    return "".join(character if character.isprintable() else "?" for character in text[:200])
