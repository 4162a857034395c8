"""Figures of a comparison: cases solved by hand, and cases computed again in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phisight.compare import metrics
from phisight.compare.metrics import Divergence, Positions, log_softmax, positions_of
from phisight.errors import EngineError


def logits(*rows: tuple[float, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Of probabilities, and moved by a constant, which changes nothing."""
    return (np.log(np.array(rows)) + 7).astype(np.float32)


def test_two_tokens_by_hand() -> None:
    found = positions_of(logits((0.5, 0.5)), logits((0.9, 0.1)), [1])
    assert found.kld[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), abs=1e-6)
    assert found.reference[0] == pytest.approx(math.log(0.5), abs=1e-6)
    assert found.variant[0] == pytest.approx(math.log(0.1), abs=1e-6)


def test_the_direction_is_reference_to_variant() -> None:
    sure, unsure = logits((0.999, 0.001)), logits((0.5, 0.5))
    forward, backward = positions_of(sure, unsure, [0]).kld[0], positions_of(unsure, sure, [0]).kld[0]
    assert forward == pytest.approx(0.999 * math.log(1.998) + 0.001 * math.log(0.002), abs=1e-5)
    assert backward == pytest.approx(0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(500), abs=1e-5)


def test_equal_logits_diverge_by_exactly_nothing() -> None:
    some = np.random.default_rng(1).normal(0, 9, (5, 300)).astype(np.float32)
    found = Divergence.of(positions_of(some, some.copy(), [0, 1, 2, 3, 4]))
    assert (found.kld_max, found.kld_error, found.same_top1) == (0.0, 0.0, 1.0)
    assert (found.right_token_rms, found.ppl_ratio, found.ppl_ratio_error) == (0.0, 1.0, 0.0)


def test_a_tiny_divergence_is_not_lost_in_rounding() -> None:
    reference = np.array([[60.0, 60.0]], np.float32)
    variant = np.array([[60.0, np.nextafter(np.float32(60), np.float32(61))]], np.float32)
    step = float(variant[0, 1]) - 60
    found = positions_of(reference, variant, [0]).kld[0]
    assert found == pytest.approx(step**2 / 8, rel=1e-3)  # of two even probabilities, to second order
    assert 0 < found < 1e-11


def test_log_softmax_survives_large_logits() -> None:
    found = log_softmax(np.array([[3e38, -3e38, 3e38]], np.float32))
    np.testing.assert_allclose(found[0, [0, 2]], math.log(0.5), rtol=1e-12)
    assert found[0, 1] < -1e38


def test_everything_against_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(0, 3, (40, 11)).astype(np.float32)
    variant = (reference + rng.normal(0, 0.4, reference.shape)).astype(np.float32)
    right = rng.integers(0, 11, 40)
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 8 * 11 * 7)  # blocks of seven rows, the last one shorter
    found = Divergence.of(positions_of(reference, variant, right))

    kld, change, surplus, same = [], [], [], 0
    for p_row, q_row, token in zip(reference.tolist(), variant.tolist(), right.tolist(), strict=True):
        p_sum, q_sum = (math.fsum(map(math.exp, row)) for row in (p_row, q_row))
        p, q = [math.exp(x) / p_sum for x in p_row], [math.exp(x) / q_sum for x in q_row]
        kld.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        change.append(q[token] - p[token])
        surplus.append(math.log(p[token] / q[token]))
        same += p.index(max(p)) == q.index(max(q))
    ordered = sorted(kld)
    assert found.positions == 40
    assert found.kld_mean == pytest.approx(math.fsum(kld) / 40)
    assert found.kld_median == pytest.approx((ordered[19] + ordered[20]) / 2)
    assert found.kld_p99 == pytest.approx(ordered[38] + 0.61 * (ordered[39] - ordered[38]))
    assert found.kld_max == pytest.approx(ordered[-1])
    assert ordered[38] < found.kld_p99 < found.kld_p999 < found.kld_max
    assert found.same_top1 == same / 40 < 1
    assert found.right_token_mean == pytest.approx(math.fsum(change) / 40)
    assert found.right_token_rms == pytest.approx(math.sqrt(math.fsum(x * x for x in change) / 40))
    mean = math.fsum(surplus) / 40
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in surplus) / 39 / 40)
    assert found.ppl_ratio == pytest.approx(math.exp(mean))
    assert found.ppl_ratio_error == pytest.approx(math.exp(mean) * error)
    assert found.ppl_variant / found.ppl_reference == pytest.approx(found.ppl_ratio)


def test_a_variant_that_rules_the_right_token_out() -> None:
    found = Divergence.of(positions_of(logits((0.5, 0.5)), np.array([[0, -3000]], np.float32), [1]))
    assert found.kld_mean == pytest.approx(1500, rel=0.01)
    assert math.isfinite(found.ppl_ratio)


def test_positions_survive_json() -> None:
    some = positions_of(logits((0.3, 0.7), (0.6, 0.4)), logits((0.31, 0.69), (0.2, 0.8)), [0, 1])
    again = Positions.from_json(some.as_json())
    assert Divergence.of(again) == Divergence.of(some)
    assert again.same_top1.tolist() == [True, False]
    assert len(Positions.joined([some, again])) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    good = logits((0.5, 0.5))
    with pytest.raises(EngineError, match="the variant's logits are not all finite"):
        positions_of(good, np.array([[0, bad]], np.float32), [0])
    with pytest.raises(EngineError, match="the reference's logits"):
        positions_of(np.array([[bad, 0]], np.float32), good, [0])


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        positions_of(logits((0.5, 0.5)), logits((0.2, 0.3, 0.5)), [0])
    with pytest.raises(ValueError, match="do not fit"):
        positions_of(logits((0.5, 0.5)), logits((0.5, 0.5)), [0, 1])
    with pytest.raises(ValueError, match="no positions"):
        Divergence.of(Positions(*(np.empty(0),) * 4))
