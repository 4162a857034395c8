"""ggml's own quantiser, in the library that llama-cpp-python ships, called through ctypes.

`ggml_quantize_chunk` (https://github.com/ggml-org/ggml/blob/master/include/ggml.h) packs whole rows of float32 into
any type that ggml can quantise. It is used for what we do not pack ourselves: everything but Q4_0 and Q8_0.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from phisight.errors import EngineError

__all__ = ["GgmlQuantizer", "ggml_row_bytes", "ggml_type"]


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    """The type of a name such as Q4_K or IQ4_XS. Raises KeyError."""
    return gguf.GGMLQuantizationType[name]


def ggml_row_bytes(name: str, columns: int) -> int:
    """Bytes of a row of `columns` weights, which must be a multiple of the type's block."""
    block, size = gguf.GGML_QUANT_SIZES[ggml_type(name)]
    return columns // block * size


class GgmlQuantizer:
    """Quantises rows to one type. Threads may share it: the call releases the interpreter."""

    def __init__(self, name: str) -> None:
        """Raises EngineError without llama-cpp-python."""
        self._type = ggml_type(name)
        self._name = name
        self._library = _library()

    def quantize(self, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        """(rows, columns) float32 -> (rows, bytes of a row) uint8.

        `importance` (columns,) float32 weighs the columns' errors, as an importance matrix does.
        Raises EngineError if ggml wrote another number of bytes.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        count, columns = rows.shape
        packed = np.empty((count, ggml_row_bytes(self._name, columns)), np.uint8)
        pointer = ctypes.POINTER(ctypes.c_float)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data_as(pointer)
        written = self._library.ggml_quantize_chunk(
            self._type.value,
            rows.ctypes.data_as(pointer),
            packed.ctypes.data_as(ctypes.c_void_p),
            0,
            count,
            columns,
            weights,
        )
        if written != packed.nbytes:
            raise EngineError(f"ggml wrote {written} bytes of {self._name}, expected {packed.nbytes}")
        return packed


@cache
def _library() -> Any:
    try:
        from llama_cpp import _ggml
    except ImportError as error:
        raise EngineError(
            f'this type needs ggml\'s quantiser ({error.name} is missing): pip install "phisight[gguf]"'
        ) from None
    library = _ggml.libggml
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_float),
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.POINTER(ctypes.c_float),
    ]
    return library
