"""Round to nearest: no statistics, each block's scale from its largest weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phisight.quant.blocks import Blocks, quantize_blocks
from phisight.quant.methods.base import InputStatistics, Method
from phisight.quant.scheme import BlockScheme

__all__ = ["RoundToNearest"]


@dataclass(frozen=True)
class RoundToNearest(Method):
    """`quantize_blocks` as a method."""

    name: str = "rtn"

    def prepare(self, scheme: BlockScheme, statistics: InputStatistics | None) -> _Rounder:
        return _Rounder(scheme)


@dataclass(frozen=True)
class _Rounder:
    scheme: BlockScheme
    notes: tuple[str, ...] = ()

    def quantize(self, weights: NDArray[np.float32]) -> Blocks:
        return quantize_blocks(weights, self.scheme)
