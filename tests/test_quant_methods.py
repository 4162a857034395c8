"""What all quantisation methods promise, and the scale search and AWQ against brute force."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phisight.errors import CheckpointError, InputError
from phisight.quant.blocks import Blocks, dequantize_blocks, quantize_blocks
from phisight.quant.methods.awq import Awq, search_channel_scales
from phisight.quant.methods.base import (
    InputStatistics,
    Method,
    StatisticsSum,
    merge_statistics,
    objective,
    row_errors,
)
from phisight.quant.methods.gptq import Gptq
from phisight.quant.methods.rtn import RoundToNearest
from phisight.quant.methods.search import ScaleSearch
from phisight.quant.scheme import BlockScheme

Floats = NDArray[np.float32]
BITS: tuple[Literal[4, 8], ...] = (4, 8)
SIZES: tuple[Literal[32, 64, 128], ...] = (32, 64, 128)
SCHEMES = [BlockScheme(bits, size, symmetric) for bits in BITS for size in SIZES for symmetric in (True, False)]
METHODS: list[Method] = [RoundToNearest(), ScaleSearch(), ScaleSearch(correlated=True), Awq(), Gptq()]
Q4 = BlockScheme(4, 32)


def inputs(columns: int, seed: int = 0, tokens: int = 400) -> Floats:
    """Inputs that depend on each other, of very different sizes, one channel an outlier."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, columns // 3 + 1)) @ rng.normal(size=(columns // 3 + 1, columns))
    x = (x + 0.5 * rng.normal(size=x.shape)) * rng.lognormal(0, 1, columns)
    x[:, columns // 2] *= 50
    return x.astype(np.float32)


def statistics(x: Floats) -> InputStatistics:
    total = StatisticsSum(x.shape[1])
    total.add(x)
    return total.finish()


def matrix(rows: int, columns: int, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_t(4, size=(rows, columns)) * 0.02).astype(np.float32)


def within_blocks(known: InputStatistics, size: int) -> InputStatistics:
    """The same without what goes from one block to another."""
    block = np.arange(known.columns) // size
    assert known.hessian is not None
    hessian = np.where(block[:, None] == block, known.hessian, np.float32(0))
    return InputStatistics(known.second_moment, hessian, known.count)


def diagonal(known: InputStatistics) -> InputStatistics:
    return InputStatistics(known.second_moment, None, known.count)


def test_statistics_are_means_over_weighted_tokens() -> None:
    """In three portions and merged, more columns than are worked on at once."""
    x = inputs(1100, tokens=60)
    weights = np.random.default_rng(1).uniform(0, 2, 60).astype(np.float32)
    first, second = StatisticsSum(1100), StatisticsSum(1100)
    first.add(x[:20], weights[:20])
    first.add(x[20:30], weights[20:30])
    second.add(x[30:], weights[30:])
    merged = merge_statistics([first.finish(), second.finish()])
    expected = (x.astype(np.float64) * weights[:, None]).T @ x / weights.sum()
    assert merged.hessian is not None
    assert merged.count == pytest.approx(weights.sum())
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(merged.hessian / scale, expected / scale, atol=1e-5)
    np.testing.assert_allclose(merged.second_moment, np.diag(expected), rtol=1e-5)
    np.testing.assert_allclose(merged.hessian, merged.hessian.T, rtol=1e-6)

    w, other = matrix(3, 1100), matrix(3, 1100, seed=1)
    outputs = np.square((w - other).astype(np.float64) @ x.T) @ weights / weights.sum()
    np.testing.assert_allclose(row_errors(w, other, merged), outputs, rtol=1e-4)


def test_a_token_of_weight_zero_was_not_there() -> None:
    x = inputs(40)
    total = StatisticsSum(40)
    total.add(x, np.repeat(np.array([1, 0], np.float32), 200))
    np.testing.assert_allclose(total.finish().second_moment, statistics(x[:200]).second_moment, rtol=1e-6)


def test_statistics_that_cannot_be_are_refused() -> None:
    good, bad = np.ones(2, np.float32), np.array([1, np.nan], np.float32)
    with pytest.raises(InputError, match="second moments are not finite"):
        InputStatistics(bad, None, 1)
    with pytest.raises(InputError, match="second moment is -1"):
        InputStatistics(-good, None, 1)
    with pytest.raises(InputError, match="Hessian is not finite"):
        InputStatistics(good, np.array([[1, np.inf], [0, 1]], np.float32), 1)
    with pytest.raises(InputError, match=r"Hessian of \(3, 3\), wanted \(2, 2\)"):
        InputStatistics(good, np.eye(3, dtype=np.float32), 1)
    with pytest.raises(InputError, match="no tokens"):
        StatisticsSum(2).finish()
    with pytest.raises(InputError, match="cannot be merged"):
        merge_statistics([InputStatistics(good, None, 1), InputStatistics(np.ones(3, np.float32), None, 1)])


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_never_worse_than_rounding_and_twice_the_same(method: Method, scheme: BlockScheme) -> None:
    """150 columns fill none of the blocks; one block is zero and one row has an outlier."""
    w = matrix(20, 150)
    w[3, :128] = 0
    w[5, 70] = 3
    known = statistics(inputs(150))
    blocks, again = method.quantize(w, scheme, known), method.quantize(w, scheme, known)
    for name in ("q", "scale", "zero"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(again, name))
    assert blocks.q.min() >= scheme.lowest
    assert blocks.q.max() <= scheme.highest
    assert (blocks.zero is None) == scheme.symmetric
    restored = dequantize_blocks(blocks)
    assert restored.shape == w.shape
    assert not restored[3, : scheme.block_size].any()
    padding = blocks.q.reshape(20, -1)[:, 150:] - (0 if blocks.zero is None else blocks.zero[:, -1:])
    assert not padding.any()

    own = known if isinstance(method, Gptq) else within_blocks(known, scheme.block_size)
    own = diagonal(known) if method == ScaleSearch() else own
    plain = row_errors(w, dequantize_blocks(quantize_blocks(w, scheme)), own)
    errors = row_errors(w, restored, own)
    assert (errors <= plain * 1.0001).all()
    if not isinstance(method, RoundToNearest):
        assert errors.sum() < 0.9 * plain.sum()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 140), st.sampled_from(SCHEMES))
def test_never_worse_than_rounding(seed: int, rows: int, columns: int, scheme: BlockScheme) -> None:
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(rows, columns)) * rng.lognormal(-3, 3, (rows, columns))).astype(np.float32)
    w *= rng.random(w.shape) > 0.3
    w = np.clip(w, -1000, 1000)
    known = statistics((rng.normal(size=(8, columns)) * rng.lognormal(0, 2, columns)).astype(np.float32))
    plain = dequantize_blocks(quantize_blocks(w, scheme))
    for method, own in ((ScaleSearch(), diagonal(known)), (Gptq(), known)):
        errors = row_errors(w, dequantize_blocks(method.quantize(w, scheme, known)), own)
        # A Hessian of 8 tokens is singular: float32 leaves of its smallest errors only the order of magnitude.
        floor = 1e-5 * row_errors(w, np.zeros_like(w), diagonal(known)) + 1e-12
        assert (errors <= row_errors(w, plain, own) * 1.0001 + floor).all()


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_weights_that_no_scale_holds(method: Method, value: float) -> None:
    w = matrix(4, 40)
    w[2, 35] = value
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"), np.errstate(invalid="ignore"):
        method.quantize(w, Q4, statistics(inputs(40)))


@pytest.mark.parametrize("method", METHODS[1:], ids=repr)
def test_statistics_of_another_layer(method: Method) -> None:
    with pytest.raises(InputError, match="statistics of 40 columns for weights of 64"):
        method.quantize(matrix(4, 64), Q4, statistics(inputs(40)))


def test_what_needs_a_hessian_says_so() -> None:
    known = diagonal(statistics(inputs(40)))
    for method in (Gptq(), ScaleSearch(correlated=True)):
        with pytest.raises(InputError, match=rf"^{method.name} needs the inputs' Hessian"):
            method.prepare(Q4, known)
    assert Awq().quantize(matrix(4, 40), Q4, known).q.shape == (4, 2, 32)


def _exhaustive(w: Floats, importance: Floats, zeros: range) -> float:
    """The least error of one block over a fine grid of scales, as float16 has them, and all zero points."""
    magnitude = np.abs(w).max() * np.arange(0.03, 0.3, 0.0002)
    scales = np.concatenate([magnitude, -magnitude]).astype(np.float16).astype(np.float64)[:, None]
    best = np.inf
    for zero in zeros:
        q = np.clip(np.rint(w / scales) + zero, -8, 7) - zero
        best = min(best, float((np.square(w - q * scales) * importance).sum(axis=1).min()))
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_search_finds_nearly_the_best_scale(symmetric: bool, weighted: bool) -> None:
    w = matrix(16, 32)
    importance = np.random.default_rng(2).lognormal(0, 2 if weighted else 0, 32).astype(np.float32)
    known = InputStatistics(importance, None, 1)
    found = row_errors(w, dequantize_blocks(ScaleSearch().quantize(w, BlockScheme(4, 32, symmetric), known)), known)
    best = np.array([_exhaustive(row, importance, range(1) if symmetric else range(-8, 8)) for row in w])
    assert (found > 0.98 * best).all()  # the grid is fine, not exact
    assert found.sum() < 1.02 * best.sum()
    assert found.max() < 1.25 * best[found.argmax()]


def test_search_of_the_plain_error_needs_no_statistics() -> None:
    w = matrix(8, 64)
    ones = InputStatistics(np.ones(64, np.float32), None, 1)
    without, same = ScaleSearch().quantize(w, Q4), ScaleSearch().quantize(w, Q4, ones)
    np.testing.assert_array_equal(without.q, same.q)
    assert objective(w, without, None) < 0.95 * objective(w, quantize_blocks(w, Q4), None)


def test_rows_come_in_slices() -> None:
    """More rows and blocks than are worked on at once."""
    w = matrix(1300, 300)
    known = statistics(inputs(300))
    for method in (ScaleSearch(), ScaleSearch(correlated=True)):
        ready = method.prepare(Q4, known)
        whole = ready.quantize(w)
        parts = [ready.quantize(w[start : start + 512]) for start in range(0, 1300, 512)]
        same = np.concatenate([part.q for part in parts]) == whole.q
        assert same.mean() > 0.999  # products of other shapes are rounded otherwise


def test_weights_that_lie_on_the_grid_are_kept() -> None:
    rng = np.random.default_rng(3)
    scheme = BlockScheme(4, 32, symmetric=False)
    q = rng.integers(-8, 8, (6, 3, 32)).astype(np.int8)
    q[..., :2] = [-8, 7]
    exact = Blocks(q, (2.0 ** rng.integers(-8, 0, (6, 3))).astype(np.float16), 96, rng.integers(-8, 8, (6, 3), np.int8))
    w = dequantize_blocks(exact)
    for method in METHODS:
        np.testing.assert_array_equal(dequantize_blocks(method.quantize(w, scheme, statistics(inputs(96)))), w)


@pytest.mark.parametrize("method", [RoundToNearest(), ScaleSearch()])
def test_channel_scales_lessen_the_error_of_an_outlier_channel(method: Method) -> None:
    matrices = matrix(64, 96), matrix(32, 96, seed=1)
    known = statistics(inputs(96))
    moments = InputStatistics(known.second_moment, None, known.count)
    found = search_channel_scales(matrices, Q4, known, method)
    assert found.scale.shape == (96,)
    assert found.scale[48] > 2 * np.median(found.scale)  # the outlier
    assert found.error < 0.9 * found.plain_error
    plain = sum(objective(each, method.quantize(each, Q4, moments), known) for each in matrices)
    assert found.plain_error == pytest.approx(plain, rel=1e-4)
    # Over the scales, the error of scaled weights for scaled inputs is one of the weights for the inputs.
    folded, unit = known.scaled(1 / found.scale), moments.scaled(1 / found.scale)
    scaled = [each * found.scale for each in matrices]
    error = sum(objective(each, method.quantize(each, Q4, unit), folded) for each in scaled)
    assert found.error == pytest.approx(error, rel=1e-3)
    for better in Awq(), Gptq():
        assert sum(objective(each, better.quantize(each, Q4, folded), folded) for each in scaled) < error
    # The layer itself is unchanged: scaled weights and inputs have the same outputs.
    x, w = inputs(96), matrices[0]
    np.testing.assert_allclose((x / found.scale) @ scaled[0].T, x @ w.T, rtol=1e-3, atol=1e-3 * np.abs(x @ w.T).max())


def test_channel_scales_are_chosen_for_the_method_that_follows() -> None:
    """Judged by plain rounding they are no better for the search of block scales, and here they are worse."""
    matrices = [matrix(64, 96, seed=seed) for seed in range(4)]
    known = statistics(inputs(96))
    searched = search_channel_scales(matrices, Q4, known)
    rounded = search_channel_scales(matrices, Q4, known, RoundToNearest())

    def error(scale: Floats) -> float:
        moments = InputStatistics(known.second_moment, None, known.count).scaled(1 / scale)
        blocks = [ScaleSearch().quantize(each * scale, Q4, moments) for each in matrices]
        return sum(
            objective(each * scale, found, known.scaled(1 / scale))
            for each, found in zip(matrices, blocks, strict=True)
        )

    assert error(searched.scale) == pytest.approx(searched.error, rel=1e-3)
    assert error(searched.scale) <= error(rounded.scale) < searched.plain_error


def test_channel_scales_of_one_origin_are_equal() -> None:
    """As where heads share what the scales are folded into: every candidate is one that can be folded."""

    def pairs(scale: Floats) -> Floats:
        return np.repeat(np.sqrt(scale.reshape(-1, 2).prod(axis=1)), 2).astype(np.float32)

    w, known = matrix(64, 96), statistics(inputs(96))
    found = search_channel_scales([w], Q4, known, admit=pairs)
    np.testing.assert_array_equal(found.scale[::2], found.scale[1::2])
    assert search_channel_scales([w], Q4, known).error < found.error < found.plain_error


def test_channel_scales_of_one_where_none_helps() -> None:
    w = np.zeros((4, 32), np.float32)
    found = search_channel_scales([w], Q4, statistics(inputs(32)))
    assert (found.scale == 1).all()
    assert (found.exponent, found.error, found.plain_error) == (0, 0, 0)
    with pytest.raises(InputError, match=r"columns, wanted the same number"):
        search_channel_scales([w], Q4, statistics(inputs(33)))
