"""Scale search: for each block the scale (and zero point) of the least weighted squared error.

The error of a block is `sum m d^2` with `d = w - (q - zero) scale` and m the second moment of each column's input, or
one; or `d^T H d` with the block's part of the Hessian. For given integers the best scale has a closed form, so the
search is over integers: those to which a grid of scales rounds, each refitted (as llama.cpp's quantiser does it,
`make_qx_quants` in https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c). A finer grid about the
best and refits of the stored scale follow. A block for which rounding to nearest does better keeps that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.quant.blocks import FLOAT16_MAX, Blocks, quantize_blocks, split_blocks
from phisight.quant.methods.base import InputStatistics, Method
from phisight.quant.scheme import BlockScheme

__all__ = ["ScaleSearch", "ScaleSearcher"]

Floats = NDArray[np.float32]

COARSE = np.arange(0.75, 2.01, 0.0625)
"""By how much finer than rounding to nearest the steps are: above one the largest weights are clipped."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of what asymmetric blocks clip, how much at the low end."""
FINE = (-0.036, -0.024, -0.012, 0.012, 0.024, 0.036)
"""Relative changes of the best scale that are tried next."""
REFITS = 3
ROWS = 512
CHUNK = 1 << 17
"""Rows, and weights of them, that are worked on at once: small enough for the processor's cache."""


@dataclass(frozen=True)
class ScaleSearch(Method):
    """Minimises the second-moment-weighted squared error of each block, the plain one without statistics.

    If `correlated`, it takes the Hessian within each block in place of the second moments.
    """

    correlated: bool = False
    name: str = "search"

    def prepare(self, scheme: BlockScheme, statistics: InputStatistics | None) -> ScaleSearcher:
        """Raises InputError if the Hessian is wanted and was not collected."""
        if self.correlated:
            if statistics is None or statistics.hessian is None:
                raise InputError(f"{self.name} needs the inputs' Hessian, and none was collected: calibrate with it")
            metric = _diagonal_blocks(statistics.hessian, scheme)
        elif statistics is not None:
            metric = split_blocks(statistics.second_moment[None], scheme)[0][..., None]
        else:
            return ScaleSearcher(scheme, None)
        # Only ratios matter; about one, no square leaves float32's range.
        largest = metric.max()
        return ScaleSearcher(scheme, metric / largest if largest > 0 else metric, statistics.columns)


@dataclass(frozen=True)
class ScaleSearcher:
    """Searches the scales of one layer. Threads may share it.

    `metric` weighs errors: (blocks, block_size, 1) a weight for each column, (blocks, block_size, block_size) the
    products of any two of a block, or None. `columns` is what it was made for.
    """

    scheme: BlockScheme
    metric: Floats | None
    columns: int | None = None
    notes: tuple[str, ...] = ()

    def quantize(self, weights: Floats) -> Blocks:
        """(rows, columns) float32 -> blocks. Raises CheckpointError as `quantize_blocks`."""
        self.check(weights)
        rows = len(weights)
        found = quantize_blocks(weights, self.scheme)
        size, count = self.scheme.block_size, found.scale.shape[1]
        step = max(1, CHUNK // (size * min(rows, ROWS)))
        for start in range(0, rows, ROWS):
            part = weights[start : start + ROWS]
            for first in range(0, count, step):
                x = split_blocks(part[:, first * size : (first + step) * size], self.scheme)
                metric = None if self.metric is None else self.metric[first : first + step]
                _improve(x, metric, found.part(slice(start, start + ROWS), slice(first, first + step)), self.scheme)
        return found

    def check(self, weights: Floats) -> None:
        """Raises InputError for weights of other columns."""
        if self.columns not in (None, weights.shape[1]):
            raise InputError(f"calibration: statistics of {self.columns} columns for weights of {weights.shape[1]}")


class _Best:
    """The best found so far of each block; all arrays (blocks, rows)."""

    def __init__(self, error: Floats, scale: Floats, zero: Floats | None) -> None:
        self.error = error
        self.scale = scale
        self.zero = zero
        self.improved = np.zeros(error.shape, np.bool_)

    def keep(self, error: Floats, scale: Floats, zero: Floats | None) -> None:
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.scale = np.where(better, scale, self.scale)
        self.zero = None if self.zero is None or zero is None else np.where(better, zero, self.zero)
        self.improved |= better


def _improve(weights: Floats, metric: Floats | None, blocks: Blocks, scheme: BlockScheme) -> None:
    """Replace those of some blocks for which the search finds better ones. weights: (rows, blocks, block_size)."""
    zero = None if blocks.zero is None else blocks.zero.T.astype(np.float32)
    scale = blocks.scale.T.astype(np.float32)
    q = _rows_last(blocks.q)
    if zero is not None:
        q -= zero[:, None]
    fit = _Fit(_rows_last(weights), metric, scheme)
    nearest = _Best(fit.error(q, scale), scale, zero)

    # First over integers, each with the scale that fits them best, as if scales were exact.
    ideal = _Best(np.full(scale.shape, np.inf, np.float32), scale, zero)
    for candidate, candidate_zero in _coarse(fit.x, scheme):
        fit.refitted(candidate, candidate_zero, ideal)
    for move in (0,) if ideal.zero is None else (0, -1, 1):
        centre = ideal.scale
        moved = None if ideal.zero is None else np.clip(ideal.zero + move, scheme.lowest, scheme.highest)
        for change in FINE:
            fit.refitted(centre * np.float32(1 + change), moved, ideal)

    # Then as stored: the scale is rounded, the integers follow it, and it is fitted to them once more.
    stored = ideal.scale
    for _ in range(REFITS):
        used = np.clip(stored, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16).astype(np.float32)
        q = fit.round(used, ideal.zero)
        nearest.keep(fit.error(q, used), used, ideal.zero)
        stored = fit.best_scale(q)
    if not nearest.improved.any():
        return
    q = fit.round(nearest.scale, nearest.zero)
    zero_points = None
    if nearest.zero is not None:
        q += nearest.zero[:, None]
        zero_points = nearest.zero.T.astype(np.int8)
    found = Blocks(
        q.transpose(2, 0, 1).astype(np.int8), nearest.scale.T.astype(np.float16), blocks.columns, zero_points
    )
    blocks.replace(nearest.improved.T, found)


class _Fit:
    """Integers and scales for weights x (blocks, block_size, rows): rows last, for long innermost loops."""

    def __init__(self, x: Floats, metric: Floats | None, scheme: BlockScheme) -> None:
        self.x = x
        self.metric = metric
        self.scheme = scheme
        self.weighed = self._weigh(x)
        self.total: Floats = np.sum(self.weighed * x, axis=1)

    def round(self, scale: Floats, zero: Floats | None) -> Floats:
        """The nearest `q - zero` of the shape of x; scale and zero (blocks, rows)."""
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        q: Floats = self.x * inverse[:, None]
        np.rint(q, out=q)
        if zero is None:
            np.clip(q, self.scheme.lowest, self.scheme.highest, out=q)
        else:
            np.clip(q, self.scheme.lowest - zero[:, None], self.scheme.highest - zero[:, None], out=q)
        return q

    def error(self, q: Floats, scale: Floats) -> Floats:
        """(blocks, rows)."""
        difference = self.x - q * scale[:, None]
        total: Floats = (self._weigh(difference) * difference).sum(axis=1)
        return total

    def best_scale(self, q: Floats) -> Floats:
        along, square = self._moments(q)
        return np.divide(along, square, out=np.zeros_like(along), where=square > 0)

    def refitted(self, scale: Floats, zero: Floats | None, best: _Best) -> None:
        """Round with the scale, fit the scale to the integers, and keep what is better."""
        along, square = self._moments(self.round(scale, zero))
        fitted = np.divide(along, square, out=np.zeros_like(along), where=square > 0)
        best.keep(self.total - along * fitted, fitted, zero)

    def _moments(self, q: Floats) -> tuple[Floats, Floats]:
        """The products of q with x and with itself, (blocks, rows)."""
        square = self._weigh(q)
        square *= q
        q *= self.weighed
        return q.sum(axis=1), square.sum(axis=1)

    def _weigh(self, values: Floats) -> Floats:
        if self.metric is None:
            return values.copy()
        return values * self.metric if self.metric.shape[2] == 1 else self.metric @ values


def _coarse(x: Floats, scheme: BlockScheme) -> Iterator[tuple[Floats, Floats | None]]:
    """Scales and zero points to start from, (blocks, rows) each."""
    low, high = x.min(axis=1), x.max(axis=1)
    if scheme.symmetric:
        largest = np.where(high > -low, high, low)
        ends = (scheme.lowest, scheme.highest) if scheme.bits == 4 else (scheme.highest,)
        for end in ends:  # 4 bits have a level more on one side, so the sign of the scale matters
            for finer in COARSE:
                yield largest / np.float32(end * finer), None
        return
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    for finer in COARSE[::2]:
        scale = (high - low) / np.float32((scheme.highest - scheme.lowest) * finer)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        lower, upper = scheme.lowest - low * inverse, scheme.highest - high * inverse  # clips the high, the low end
        for share in SHARES:
            zero = np.rint(lower + np.float32(share) * (upper - lower))
            yield scale, np.clip(zero, scheme.lowest, scheme.highest)


def _rows_last(blocks: NDArray[np.float32 | np.int8]) -> Floats:
    """(rows, blocks, block_size) -> (blocks, block_size, rows) float32, contiguous."""
    return np.ascontiguousarray(blocks.transpose(1, 2, 0), np.float32)


def _diagonal_blocks(hessian: Floats, scheme: BlockScheme) -> Floats:
    """The Hessian's part of each block, (blocks, block_size, block_size), filled up with zeros."""
    size, columns = scheme.block_size, len(hessian)
    parts = np.zeros((scheme.blocks_per_row(columns), size, size), np.float32)
    for block, part in enumerate(parts):
        own = slice(block * size, min((block + 1) * size, columns))
        part[: own.stop - own.start, : own.stop - own.start] = hessian[own, own]
    return parts
