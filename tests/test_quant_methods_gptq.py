"""GPTQ: against its textbook form and exhaustive rounding, and Hessians that are hard to factorise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.quant.blocks import Blocks, dequantize_blocks
from phisight.quant.methods.base import InputStatistics, StatisticsSum, objective, row_errors
from phisight.quant.methods.gptq import Gptq, factorize
from phisight.quant.methods.rtn import RoundToNearest
from phisight.quant.methods.search import ScaleSearch
from phisight.quant.scheme import BlockScheme

Floats = NDArray[np.float32]
Q4 = BlockScheme(4, 32)


def correlated(columns: int, seed: int = 0) -> InputStatistics:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, columns // 3 + 1)) @ rng.normal(size=(columns // 3 + 1, columns))
    total = StatisticsSum(columns)
    total.add(((x + 0.5 * rng.normal(size=x.shape)) * rng.lognormal(0, 1, columns)).astype(np.float32))
    return total.finish()


def matrix(rows: int, columns: int, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).normal(size=(rows, columns)) * 0.02).astype(np.float32)


def textbook(weights: Floats, blocks: Blocks, known: InputStatistics, damping: float) -> NDArray[np.float64]:
    """Algorithm 1 of the paper with its inverse Hessian, columns by falling diagonal, for given scales."""
    assert known.hessian is not None
    hessian = known.hessian.astype(np.float64) + damping * known.hessian.diagonal().mean() * np.eye(known.columns)
    order = np.argsort(known.hessian.diagonal(), kind="stable")[::-1]
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    w = weights.astype(np.float64)[:, order]
    q = np.zeros_like(w)
    for at, column in enumerate(order):
        block = column // blocks.q.shape[2]
        scale = blocks.scale[:, block].astype(np.float64)
        zero = 0 if blocks.zero is None else blocks.zero[:, block]
        q[:, at] = np.clip(np.rint(w[:, at] / scale) + zero, -8, 7)
        error = (w[:, at] - (q[:, at] - zero) * scale) / upper[at, at]
        w[:, at + 1 :] -= error[:, None] * upper[at, at + 1 :]
    return q[:, np.argsort(order)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_textbook_rounds_alike(symmetric: bool) -> None:
    """300 columns: three lazy batches, the last block filled up."""
    w, known = matrix(12, 300), correlated(300)
    blocks = Gptq(damping=0.01).quantize(w, BlockScheme(4, 32, symmetric), known)
    same = blocks.q.reshape(12, -1)[:, :300] == textbook(w, blocks, known, 0.01)
    assert same.mean() > 0.99  # float32 and float64 may fall on either side of a half, and the rest follows


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_exhaustive_rounding_is_hardly_better(columns: int) -> None:
    known = correlated(columns, seed=columns)
    w = matrix(20, columns)
    blocks = Gptq(damping=0.01).quantize(w, Q4, known)
    found = row_errors(w, dequantize_blocks(blocks), known)
    levels = np.array(list(itertools.product(range(-8, 8), repeat=columns)), np.float32)
    best = np.array(
        [
            row_errors(np.tile(row, (len(levels), 1)), levels * np.float32(scale), known).min()
            for row, scale in zip(w, blocks.scale[:, 0], strict=True)
        ]
    )
    assert (found >= best * 0.999).all()
    assert found.sum() < 2 * best.sum() + 1e-9
    assert np.median(found / np.maximum(best, 1e-12)) < 1.1


def test_much_better_than_the_search_and_that_than_rounding() -> None:
    w, known = matrix(64, 256), correlated(256)
    for scheme in (Q4, BlockScheme(4, 128), BlockScheme(8, 32), BlockScheme(4, 32, symmetric=False)):
        rtn, search, gptq = (
            objective(w, method.quantize(w, scheme, known), known)
            for method in (RoundToNearest(), ScaleSearch(), Gptq())
        )
        assert gptq < 0.5 * search < 0.5 * rtn


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    moments = np.random.default_rng(0).lognormal(0, 1, 64).astype(np.float32)
    known = InputStatistics(moments, np.diag(moments), 1)
    w = matrix(8, 64)
    found, searched = Gptq(damping=0).quantize(w, Q4, known), ScaleSearch().quantize(w, Q4, known)
    assert objective(w, found, known) == pytest.approx(objective(w, searched, known), rel=1e-5)


def test_the_factor_is_made_in_place_and_gives_the_hessian_back() -> None:
    known = correlated(90)
    assert known.hessian is not None
    before = known.hessian.copy()
    factor = factorize(known, 0.01)
    np.testing.assert_array_equal(known.hessian, before)
    upper = np.triu(factor.upper).astype(np.float64)
    damped = before + 0.01 * before.diagonal().mean() * np.eye(90)
    np.testing.assert_allclose(
        upper.T @ upper, damped[np.ix_(factor.order, factor.order)], atol=1e-5 * before.diagonal().max()
    )
    assert (np.diff(before.diagonal()[factor.order]) >= 0).all()


def test_a_hessian_that_is_singular() -> None:
    """Three tokens cannot span 64 columns. Without damping it cannot be factorised; with, it is all one needs."""
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    total = StatisticsSum(64)
    total.add(x)
    known = total.finish()
    assert Gptq().prepare(Q4, known).notes == ()
    ready = Gptq(damping=0).prepare(Q4, known)
    (note,) = ready.notes
    assert note.startswith("the Hessian is not positive definite with 0 of its mean diagonal added: ")
    w = matrix(8, 64)
    assert objective(w, ready.quantize(w), known) < 0.1 * objective(w, RoundToNearest().quantize(w, Q4), known)


def test_a_hessian_that_no_damping_mends() -> None:
    hessian = np.array([[1, 5], [5, 1]], np.float32)
    with pytest.raises(InputError, match=r"^gptq: the Hessian plus 100% of its mean diagonal is not positive definite"):
        Gptq().prepare(Q4, InputStatistics(np.ones(2, np.float32), hessian, 1))


def test_channels_without_inputs() -> None:
    """A channel that was never in use is rounded by itself, and a layer that was never in use is, all of it."""
    known = correlated(64)
    assert known.hessian is not None
    known.hessian[10] = known.hessian[:, 10] = known.second_moment[10] = 0
    w = matrix(8, 64)
    restored = dequantize_blocks(Gptq().quantize(w, Q4, known))
    assert np.abs(restored - w)[:, 10].max() < 0.02
    unused = InputStatistics(np.zeros(64, np.float32), np.zeros((64, 64), np.float32), 1)
    np.testing.assert_array_equal(Gptq().quantize(w, Q4, unused).q, RoundToNearest().quantize(w, Q4).q)
