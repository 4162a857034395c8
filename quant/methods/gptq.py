"""GPTQ: each rounding error is made up for by the weights of its row that are not rounded yet.

Frantar et al., https://arxiv.org/abs/2210.17323. The objective is `d^T H d`, d a row's error, H the Hessian of the
layer's inputs. With the Cholesky factor `H = L L^T` it is `|d^T L|^2`, whose b-th term is `d_b L_bb + sum over a > b of
d_a L_ab`. So, going from the last column to the first, column b is rounded to the integer nearest to

    w_b + (sum over a > b of d_a L_ab) / L_bb

which makes the b-th term as small as it can be. That is GPTQ (https://arxiv.org/abs/2507.18553 shows that it is Babai's
nearest plane algorithm), without the inverse of H: one factorisation, in place, and less rounding.

Scales and zero points are searched before, so that columns can go in any order: those of large inputs first, and those
of small ones make up for them. The search weighs a column by `L_bb^2`, what an error in it costs after all that other
columns make up for, not by its second moment; this alone halves the error where inputs are correlated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from phisight.errors import InputError
from phisight.quant.blocks import Blocks, dequantize_blocks, quantize_blocks
from phisight.quant.methods.base import InputStatistics, Method, row_errors
from phisight.quant.methods.search import ScaleSearch, ScaleSearcher
from phisight.quant.scheme import BlockScheme

__all__ = ["Factor", "Gptq", "factorize"]

Floats = NDArray[np.float32]

DAMPING = 0.01
MOST_DAMPING = 1.0
LAZY = 128
"""Columns whose corrections by all others come from one matrix product."""
ROWS = 1024
"""Rows that are worked on at once."""


@dataclass(frozen=True)
class Factor:
    """`H[order][:, order] + damping mean(diag H) = L L^T`, columns of small inputs first.

    `upper` (columns, columns) float32 is L^T in its upper triangle; what lies below has no meaning. `damping` is the
    share that it took, `added` what that share is of the mean diagonal.
    """

    upper: Floats
    order: NDArray[np.intp]
    damping: float
    added: float

    def costs(self) -> InputStatistics:
        """What an error in each column costs after the columns that follow have made up for it, as second moments."""
        costs = np.empty(len(self.order), np.float32)
        costs[self.order] = np.square(self.upper.diagonal())
        return InputStatistics(costs, None, 0)


@dataclass(frozen=True)
class Gptq(Method):
    """Minimises `d^T H d` of each row. A row for which rounding alone does better keeps that."""

    name: str = "gptq"
    damping: float = DAMPING

    def prepare(self, scheme: BlockScheme, statistics: InputStatistics | None) -> GptqQuantizer:
        """Factorises the Hessian: one copy of it is held. Raises InputError without one."""
        if statistics is None or statistics.hessian is None:
            raise InputError("gptq needs the inputs' Hessian, and none was collected: calibrate with Hessians")
        factor = factorize(statistics, self.damping)
        return GptqQuantizer(scheme, statistics, factor, self.damping, ScaleSearch().prepare(scheme, factor.costs()))


def factorize(statistics: InputStatistics, damping: float = DAMPING) -> Factor:
    """The Cholesky factor of the damped Hessian, made in place in the one copy that this takes.

    `damping` is a share of the mean of the diagonal. It is multiplied by ten until the matrix is positive definite.
    Raises InputError if it is not with a share of one.
    """
    hessian = statistics.hessian
    if hessian is None:
        raise InputError("gptq needs the inputs' Hessian, and none was collected: calibrate with Hessians")
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean(dtype=np.float64)) or 1.0  # inputs that are all zero: any answer is right
    order = np.argsort(diagonal, kind="stable")
    while True:
        upper = hessian[np.ix_(order, order)]
        added = damping * mean
        upper[np.diag_indices_from(upper)] += np.float32(added)
        # LAPACK counts along columns: the lower triangle of the transpose is the upper triangle of the array.
        factor, info = lapack.spotrf(upper.T, lower=1, overwrite_a=1, clean=0)
        if info == 0:
            return Factor(factor.T, order, damping, added)
        del upper, factor
        if damping >= MOST_DAMPING:
            raise InputError(f"gptq: the Hessian plus {damping:.0%} of its mean diagonal is not positive definite")
        damping = min(MOST_DAMPING, max(damping * 10, 1e-6))


@dataclass(frozen=True)
class GptqQuantizer:
    """Quantises rows of one layer. Threads may share it."""

    scheme: BlockScheme
    statistics: InputStatistics
    factor: Factor
    wanted_damping: float
    scales: ScaleSearcher

    @property
    def notes(self) -> tuple[str, ...]:
        if self.factor.damping == self.wanted_damping:
            return ()
        return (
            f"the Hessian is not positive definite with {self.wanted_damping:.4g} of its mean diagonal added: "
            f"{self.factor.damping:.4g} was taken",
        )

    def quantize(self, weights: Floats) -> Blocks:
        """(rows, columns) float32 -> blocks. Raises CheckpointError as `quantize_blocks`."""
        self.scales.check(weights)
        blocks = quantize_blocks(weights, self.scheme)
        for start in range(0, len(weights), ROWS):
            rows = weights[start : start + ROWS]
            best = blocks.part(slice(start, start + ROWS))
            least = row_errors(rows, dequantize_blocks(best), self.statistics)
            if not least.any():  # weights that lie on the grid, as those of a head that was INT8 before
                continue
            other, errors = self._corrected(rows, self.scales.quantize(rows))
            best.replace(errors < least, other)
        return blocks

    def _corrected(self, weights: Floats, blocks: Blocks) -> tuple[Blocks, NDArray[np.float64]]:
        """Blocks with other integers for the same scales and zero points, and the rows' errors `d^T H d`, (rows,).

        The errors are the sums of squares of what rounding left of each term, less what damping added: they cost no
        product with the Hessian.
        """
        upper, order = self.factor.upper, self.factor.order
        scheme = self.scheme
        rows, columns = weights.shape
        # Columns become rows here, in the factor's order: each step then works on contiguous memory.
        wanted = np.ascontiguousarray(weights.T[order])  # (columns, rows)
        scales = np.ascontiguousarray(blocks.scale.T.astype(np.float32))  # (blocks, rows)
        inverses = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
        zeros = np.zeros((1, rows), np.int8) if blocks.zero is None else np.ascontiguousarray(blocks.zero.T)
        lowest, highest = np.float32(scheme.lowest) - zeros, np.float32(scheme.highest) - zeros
        errors = np.zeros_like(wanted)
        damped = np.zeros(rows, np.float64)
        levels = np.zeros((blocks.q.shape[1] * scheme.block_size, rows), np.int8)
        for stop in range(columns, 0, -LAZY):
            start = max(0, stop - LAZY)
            carried = upper[start:stop, stop:] @ errors[stop:]  # (up to LAZY, rows)
            for column in range(stop - 1, start - 1, -1):
                carry = carried[column - start]
                carry += upper[column, column + 1 : stop] @ errors[column + 1 : stop]
                target = wanted[column] + carry / upper[column, column]
                block = order[column] // scheme.block_size
                side = 0 if blocks.zero is None else block
                q = np.rint(target * inverses[block])
                np.clip(q, lowest[side], highest[side], out=q)
                stored = q * scales[block]
                errors[column] = wanted[column] - stored
                damped += np.square((target - stored) * upper[column, column])
                levels[order[column]] = q + zeros[side]
        # The padding keeps what the search gave it, the zero point.
        levels[columns:] = blocks.q.reshape(rows, -1)[:, columns:].T
        found = replace(blocks, q=np.ascontiguousarray(levels.T).reshape(blocks.q.shape))
        return found, damped - self.factor.added * np.einsum("cr,cr->r", errors, errors)
