"""What every method knows of a linear layer's inputs, what it optimises, and the signature that all methods share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.quant.blocks import Blocks, dequantize_blocks
from phisight.quant.scheme import BlockScheme

__all__ = ["InputStatistics", "Method", "Quantizer", "StatisticsSum", "merge_statistics", "objective", "row_errors"]

STRIP = 1024
"""Columns of a Hessian that are worked on at once: a temporary copy of the whole would double the memory."""


@dataclass(frozen=True)
class InputStatistics:
    """What the inputs x of a linear layer `y = W x` were, over the tokens of a calibration.

    `second_moment` (columns,) float32 is the mean of x^2. `hessian` (columns, columns) float32 is the mean of x x^T,
    symmetric, or None if it was not collected. `count` is the number of tokens, or the sum of their weights.
    """

    second_moment: NDArray[np.float32]
    hessian: NDArray[np.float32] | None
    count: float

    def __post_init__(self) -> None:
        """Raises InputError for statistics that are not finite, are negative, or whose shapes disagree."""
        columns = self.columns
        if not np.isfinite(self.second_moment).all():
            raise InputError("calibration: the inputs' second moments are not finite: an activation overflowed")
        if (self.second_moment < 0).any():
            raise InputError(f"calibration: a second moment is {self.second_moment.min()}, wanted none below zero")
        if self.hessian is None:
            return
        if self.hessian.shape != (columns, columns):
            raise InputError(f"calibration: a Hessian of {self.hessian.shape}, wanted {(columns, columns)}")
        # By rows: `isfinite` of the whole would make an array of a quarter of its size.
        if not all(np.isfinite(self.hessian[start : start + STRIP]).all() for start in range(0, columns, STRIP)):
            raise InputError("calibration: the inputs' Hessian is not finite: an activation overflowed")

    @property
    def columns(self) -> int:
        return len(self.second_moment)

    def scaled(self, factor: NDArray[np.float32], *, in_place: bool = False) -> InputStatistics:
        """The statistics of the inputs `x * factor`, factor (columns,).

        Copies the Hessian, of 17920 columns 1.2 GiB, or with `in_place` changes it: these statistics then end here.
        """
        hessian = self.hessian
        if hessian is not None:
            hessian = np.multiply(hessian, factor, out=hessian if in_place else None)
            hessian *= factor[:, None]
        second_moment = (self.second_moment * np.square(factor)).astype(np.float32)
        return InputStatistics(second_moment, hessian, self.count)


class StatisticsSum:
    """Sums over tokens as they come, from which `finish` makes the statistics.

    Second moments are summed in float64. The Hessian is summed in float32, its upper triangle alone: of 17920 columns
    it takes 1.2 GiB, and adding hundreds of tokens at a time costs it less precision than its use can tell.
    """

    def __init__(self, columns: int, hessian: bool = True) -> None:
        self._second_moment = np.zeros(columns, np.float64)
        self._hessian = np.zeros((columns, columns), np.float32) if hessian else None
        self._count = 0.0

    def add(self, inputs: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """Add tokens: inputs (tokens, columns) float32; weights (tokens,), none negative, count a token so often."""
        self._count += float(len(inputs) if weights is None else weights.sum(dtype=np.float64))
        if weights is not None:
            inputs = inputs * np.sqrt(weights)[:, None]
        self._second_moment += np.einsum("tc,tc->c", inputs, inputs, dtype=np.float64)
        if self._hessian is None:
            return
        for start in range(0, len(self._hessian), STRIP):
            self._hessian[start : start + STRIP, start:] += inputs[:, start : start + STRIP].T @ inputs[:, start:]

    def finish(self) -> InputStatistics:
        """The statistics. The Hessian is handed over, not copied: this sum ends here.

        Raises InputError if no token was added or what was added is not finite.
        """
        if not self._count > 0:
            raise InputError("calibration: no tokens were seen, wanted at least one with a weight above zero")
        hessian, self._hessian = self._hessian, None
        if hessian is not None:
            for start in range(0, len(hessian), STRIP):
                rows = hessian[start : start + STRIP]
                rows[:, start:] /= np.float32(self._count)
                corner = rows[:, start : start + STRIP]
                corner[:] = np.triu(corner) + np.triu(corner, 1).T
                hessian[start + STRIP :, start : start + STRIP] = rows[:, start + STRIP :].T
        return InputStatistics((self._second_moment / self._count).astype(np.float32), hessian, self._count)


def merge_statistics(parts: Iterable[InputStatistics]) -> InputStatistics:
    """The statistics of all the tokens together. Holds one new Hessian if each part has one, otherwise none.

    Raises InputError without a part or if the parts differ in columns.
    """
    parts = list(parts)
    if not parts or any(part.columns != parts[0].columns for part in parts):
        raise InputError(f"calibration: statistics of {[part.columns for part in parts]} columns cannot be merged")
    count = sum(part.count for part in parts)
    second_moment = np.zeros(parts[0].columns, np.float64)
    hessian = np.zeros((parts[0].columns,) * 2, np.float32) if all(p.hessian is not None for p in parts) else None
    for part in parts:
        second_moment += part.second_moment * (part.count / count)
        if hessian is None or part.hessian is None:
            continue
        for start in range(0, len(hessian), STRIP):
            hessian[start : start + STRIP] += part.hessian[start : start + STRIP] * np.float32(part.count / count)
    return InputStatistics(second_moment.astype(np.float32), hessian, count)


class Quantizer(Protocol):
    """A method made ready for one linear layer, whose rows may come in slices and on several threads."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, such as a Hessian that needed more damping."""
        ...

    def quantize(self, weights: NDArray[np.float32]) -> Blocks:
        """(rows, columns) float32 -> blocks. Raises CheckpointError for weights that no scale can hold."""
        ...


class Method(Protocol):
    """A way to choose the integers and scales of blocks. Deterministic."""

    @property
    def name(self) -> str: ...

    @abstractmethod
    def prepare(self, scheme: BlockScheme, statistics: InputStatistics | None) -> Quantizer:
        """What is computed once for a layer. Raises InputError if the method needs statistics that are not given."""
        ...

    def quantize(
        self, weights: NDArray[np.float32], scheme: BlockScheme, statistics: InputStatistics | None = None
    ) -> Blocks:
        """(rows, columns) float32 -> blocks, all rows at once. Raises CheckpointError and InputError."""
        return self.prepare(scheme, statistics).quantize(weights)


def objective(weights: NDArray[np.float32], blocks: Blocks, statistics: InputStatistics | None) -> float:
    """The squared error of the layer's outputs: the sum over rows of (w - w')^T H (w - w').

    H is the Hessian, else the diagonal matrix of the second moments, else (without statistics) one.
    """
    return float(row_errors(weights, dequantize_blocks(blocks), statistics).sum())


def row_errors(
    weights: NDArray[np.float32], restored: NDArray[np.float32], statistics: InputStatistics | None
) -> NDArray[np.float64]:
    """Each row's part in the objective, (rows,) float64, for weights and what became of them, (rows, columns)."""
    difference = weights - restored
    errors: NDArray[np.float64] = np.zeros(len(weights), np.float64)
    if statistics is None or statistics.hessian is None:
        weighted = difference if statistics is None else difference * statistics.second_moment
        np.einsum("rc,rc->r", weighted, difference, dtype=np.float64, out=errors)
        return errors
    for start in range(0, weights.shape[1], STRIP):  # H is symmetric: what lies left of the diagonal counts twice
        part = difference[:, start : start + STRIP]
        strip = statistics.hessian[:, start : start + STRIP]
        product = 2 * (difference[:, :start] @ strip[:start]) + part @ strip[start : start + STRIP]
        errors += np.einsum("rc,rc->r", product, part, dtype=np.float64)
    return errors
