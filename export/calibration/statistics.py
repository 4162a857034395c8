"""Gathering short sequences before their products are summed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phisight.quant.methods.base import InputStatistics, StatisticsSum

__all__ = ["GatheredSum"]

ROWS_AT_ONCE = 1024
"""Adding to the Hessian of 17920 columns goes through 1.2 GiB, whether for one row or for a thousand."""


class GatheredSum:
    """Sums for one linear layer with `columns` inputs, to which sequences of any length are added."""

    def __init__(self, columns: int, *, hessian: bool) -> None:
        self._sum = StatisticsSum(columns, hessian)
        self._waiting: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def add(self, x: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
        """Inputs (n, columns), each counting by its weight (n,); those of weight 0 do not count at all."""
        counts = weights > 0
        self._waiting.append((x, weights) if counts.all() else (x[counts], weights[counts]))
        if sum(len(rows) for rows, _ in self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def finish(self) -> InputStatistics:
        """The means; this sum ends here. Raises InputError for inputs that are not finite, or none that count."""
        if self._waiting:
            self._flush()
        return self._sum.finish()

    def _flush(self) -> None:
        inputs, weights = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        self._sum.add(inputs, weights)
