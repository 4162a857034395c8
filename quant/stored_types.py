"""Types that a matrix can be stored in, and what becomes of its weights there: quantised and restored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray

from phisight.quant.blocks import dequantize_blocks
from phisight.quant.ggml import GgmlQuantizer, ggml_row_bytes, ggml_type
from phisight.quant.methods.base import InputStatistics, Method
from phisight.quant.scheme import BlockScheme

__all__ = ["BlockType", "GgmlType", "Restorer", "StoredType"]

Floats = NDArray[np.float32]
Restorer: TypeAlias = Callable[[Floats], Floats]
"""Rows (n, columns) float32 -> the same as they come back from the file. Threads may share it."""


class StoredType(Protocol):
    """A type by its `label`."""

    @property
    def label(self) -> str: ...

    def stored_bytes(self, shape: tuple[int, ...]) -> int: ...

    def restorer(self, statistics: InputStatistics | None) -> Restorer:
        """What is computed once for a matrix. Raises InputError, EngineError."""
        ...


@dataclass(frozen=True)
class BlockType:
    """Our own blocks, chosen by a method, under the name that a format gives them."""

    label: str
    scheme: BlockScheme
    method: Method

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        return self.scheme.stored_bytes(shape)

    def restorer(self, statistics: InputStatistics | None) -> Restorer:
        quantizer = self.method.prepare(self.scheme, statistics)
        return lambda rows: dequantize_blocks(quantizer.quantize(rows))


@dataclass(frozen=True)
class GgmlType:
    """A type that ggml's own quantiser packs. `weighed`: errors count by the inputs' second moments, if known."""

    label: str
    weighed: bool

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        return shape[0] * ggml_row_bytes(self.label, shape[1])

    def restorer(self, statistics: InputStatistics | None) -> Restorer:
        quantizer = GgmlQuantizer(self.label)
        importance = statistics.second_moment if self.weighed and statistics is not None else None
        kind = ggml_type(self.label)
        return lambda rows: gguf.dequantize(quantizer.quantize(rows, importance), kind).astype(np.float32, copy=False)
