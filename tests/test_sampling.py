"""The sampler against a plain implementation that sorts the whole vocabulary, and values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phisight.errors import EngineError, InputError
from phisight.generate import GenerateOptions
from phisight.sampling import Sampler

VOCAB = 100352


def neutral(**fields: Any) -> GenerateOptions:
    """Options that filter nothing at temperature 1, but for the fields given."""
    return GenerateOptions(**{"temperature": 1.0, "top_p": 1.0, **fields})


def logits_of(probabilities: list[float]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = np.log(np.array(probabilities), dtype=np.float32)
    return logits


def kept(options: GenerateOptions, logits: NDArray[np.float32]) -> list[int]:
    ids, _ = Sampler(options, len(logits)).distribution(logits)
    return [int(token) for token in ids]


def random_logits(seed: int, size: int, spread: float, levels: int | None = None) -> NDArray[np.float32]:
    """Normally distributed logits; `levels` rounds them, so that many are equal."""
    logits = np.random.default_rng(seed).normal(0, spread, size)
    return (logits if levels is None else np.round(logits * levels) / levels).astype(np.float32)


def reference(options: GenerateOptions, logits: NDArray[np.float32]) -> dict[int, float]:
    """Probabilities by id, from one sorted list and plain loops. Without penalty."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: options.top_k]
    top = float(logits[order[0]])
    weights = {token: math.exp((float(logits[token]) - top) / options.temperature) for token in order}
    weights = {token: weight for token, weight in weights.items() if weight >= options.min_p}
    wanted, mass, nucleus = options.top_p * math.fsum(weights.values()), 0.0, {}
    for token, weight in weights.items():
        nucleus[token] = weight
        mass += weight
        if options.top_p < 1 and mass >= wanted:  # at 1 every token stays, whatever the sum rounds to
            break
    total = math.fsum(nucleus.values())
    return {token: weight / total for token, weight in nucleus.items()}


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 7, 352, 1500, 5000]),
    spread=st.sampled_from([0.01, 0.5, 3.0, 10.0]),
    levels=st.sampled_from([None, 1, 4]),
    temperature=st.floats(0.05, 3),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999, 1.0]),
    top_k=st.sampled_from([None, 1, 2, 50, 351, 4000]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_distribution_is_that_of_a_full_sort(
    seed: int,
    size: int,
    spread: float,
    levels: int | None,
    temperature: float,
    top_p: float,
    top_k: int | None,
    min_p: float,
) -> None:
    logits = random_logits(seed, size, spread, levels)
    options = GenerateOptions(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    ids, probabilities = Sampler(options, size).distribution(logits)
    wanted = reference(options, logits)
    if ids.tolist() != sorted(wanted):
        # The two add up in another order: they may part where the mass meets top_p to float32 precision.
        assert boundary_is_met(options, logits, set(ids.tolist()))
        return
    np.testing.assert_allclose(
        probabilities, [wanted[token] for token in sorted(wanted)], rtol=1e-4, atol=1e-12
    )  # the weights are float32


def boundary_is_met(options: GenerateOptions, logits: NDArray[np.float32], found: set[int]) -> bool:
    everything = reference(
        GenerateOptions(temperature=options.temperature, top_p=1.0, top_k=options.top_k, min_p=options.min_p),
        logits,
    )
    leading = list(everything)[: len(found)]
    mass = math.fsum(everything[token] for token in leading)
    last = everything[leading[-1]]
    near = abs(mass - options.top_p) < 1e-6 or abs(mass - last - options.top_p) < 1e-6  # sums of float32 weights
    return set(leading) == found and near


@pytest.mark.parametrize("spread", [8.0, 5.0, 4.0, 0.2])
def test_top_p_at_the_real_vocabulary_keeps_the_smallest_set(spread: float) -> None:
    """A few tokens up to most of the vocabulary: every number of candidates that is tried is used."""
    logits = random_logits(7, VOCAB, spread)
    ids, _ = Sampler(neutral(top_p=0.9), VOCAB).distribution(logits)
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-logits, kind="stable")
    size = int(np.searchsorted(np.cumsum(probabilities[order]), 0.9)) + 1
    np.testing.assert_array_equal(ids, np.sort(order[:size]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.4, "top_p": 0.8},
        {"top_k": 5, "min_p": 0.05},
        {"top_k": 9, "top_p": 0.9, "temperature": 2.0},
    ],
)
def test_draws_follow_the_distribution(fields: dict[str, Any]) -> None:
    """Chi-square over 20000 draws; the bound is 6 standard deviations above its mean."""
    logits = random_logits(3, 16, 1.5)
    options = neutral(seed=11, **fields)
    sampler = Sampler(options, len(logits))
    draws = 20000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=len(logits))
    wanted = reference(options, logits)
    assert counts.sum() == counts[sorted(wanted)].sum()  # nothing else was ever drawn
    expected = np.array([wanted[token] * draws for token in sorted(wanted)])
    statistic = float(((counts[sorted(wanted)] - expected) ** 2 / expected).sum())
    freedom = len(wanted) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    logits = np.array([1, 5, 5, 2], dtype=np.float32)
    options = GenerateOptions(temperature=0, top_k=3, top_p=0.1)
    assert Sampler(options, 4).sample(logits) == 1
    assert kept(options, logits) == [1]


def test_filters_by_hand() -> None:
    logits = logits_of([0.1, 0.4, 0.2, 0.3])
    assert kept(neutral(), logits) == [0, 1, 2, 3]
    assert kept(neutral(top_k=2), logits) == [1, 3]
    assert kept(neutral(min_p=0.6), logits) == [1, 3]  # at least 0.24
    assert kept(neutral(top_p=0.69), logits) == [1, 3]
    assert kept(neutral(top_p=0.71), logits) == [1, 2, 3]
    assert kept(neutral(top_p=0.01), logits) == [1]


def test_each_filter_works_on_what_the_one_before_kept() -> None:
    logits = logits_of([0.1, 0.4, 0.2, 0.3])
    # Of the whole, 0.4 falls short of 0.55; among the two that top-k keeps it is 0.4 / 0.7 = 0.571.
    assert kept(neutral(top_p=0.55), logits) == [1, 3]
    assert kept(neutral(top_p=0.55, top_k=2), logits) == [1]
    assert kept(neutral(top_p=0.55, min_p=0.6), logits) == [1]


def test_temperature_comes_before_min_p() -> None:
    """At temperature 0.5 probabilities are squared: 0.3 is (0.3 / 0.4)^2 = 0.5625 of the likeliest."""
    logits = logits_of([0.1, 0.4, 0.2, 0.3])
    assert kept(neutral(temperature=0.5, min_p=0.57), logits) == [1]
    assert kept(neutral(temperature=0.5, min_p=0.55), logits) == [1, 3]


def test_of_equal_tokens_the_lowest_ids_are_kept() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    logits[500] = 1
    assert kept(neutral(top_k=3), logits) == [0, 1, 500]
    even = np.zeros(1000, dtype=np.float32)
    assert kept(neutral(top_p=0.25), even) == list(range(250))


@pytest.mark.parametrize(
    ("temperature", "spread"), [(1e-300, 1.0), (1e-6, 1e4), (1e300, 1.0), (1.0, 3e38), (0.8, 1e-30)]
)
def test_extreme_values_give_a_distribution(temperature: float, spread: float) -> None:
    logits = np.array([0, 1, -1, 0.5], dtype=np.float32) * np.float32(spread)
    for filters in ({}, {"min_p": 0.01}, {"top_k": 3}, {"top_p": 0.9}):
        sampler = Sampler(neutral(temperature=temperature, seed=1, **filters), 4)
        _, probabilities = sampler.distribution(logits)
        assert np.isfinite(probabilities).all()
        assert math.isclose(probabilities.sum(), 1)
        assert sampler.sample(logits) in ([1] if temperature < 1 and spread >= 1 else range(4))


def test_repetition_penalty_by_hand() -> None:
    """Tokens 0 and 1 were seen: 2 / 1.25 = 1.6, -2 * 1.25 = -2.5."""
    sampler = Sampler(neutral(repetition_penalty=1.25), 4)
    sampler.observe(np.array([0, 1, 0]))
    _, probabilities = sampler.distribution(np.array([2, -2, 1, 0], dtype=np.float32))
    weights = np.exp([1.6, -2.5, 1.0, 0.0])
    np.testing.assert_allclose(probabilities, weights / weights.sum(), rtol=1e-6)


def test_repetition_penalty_holds_for_greedy_too() -> None:
    sampler = Sampler(GenerateOptions(temperature=0, repetition_penalty=1.5), 3)
    logits = np.array([1.2, 1.1, -3], dtype=np.float32)
    assert sampler.sample(logits) == 0
    sampler.observe(0)
    assert sampler.sample(logits) == 1


def test_extreme_penalties_stay_finite() -> None:
    sampler = Sampler(neutral(repetition_penalty=1e-300), 3)
    sampler.observe(np.array([0, 1]))
    ids, probabilities = sampler.distribution(np.array([1, -1, 0], dtype=np.float32))
    assert dict(zip(ids.tolist(), probabilities.tolist(), strict=True))[0] == 1


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_logits_are_only_read(fields: dict[str, Any]) -> None:
    logits = random_logits(1, 3000, 2)
    logits.flags.writeable = False
    before = logits.copy()
    sampler = Sampler(neutral(repetition_penalty=1.3, **fields), len(logits))
    sampler.observe(5)
    sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


def test_same_seed_same_tokens() -> None:
    logits = random_logits(5, 500, 1)

    def draw(seed: int | None) -> tuple[int, list[int]]:
        sampler = Sampler(neutral(seed=seed), len(logits))
        return sampler.seed, [sampler.sample(logits) for _ in range(30)]

    assert draw(42) == draw(42)
    assert draw(42)[1] != draw(43)[1]
    seed, tokens = draw(None)
    assert draw(seed) == (seed, tokens)
    assert draw(None)[0] != seed  # 1 in 4 billion


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {},
        {"temperature": 50.0},
        {"top_p": 0.9},
        {"top_k": 30},
        {"min_p": 0.2},
        {"temperature": 0, "repetition_penalty": 1.5},
    ],
)
def test_ids_from_the_limit_on_are_never_drawn(fields: dict[str, Any]) -> None:
    """They are the likeliest ones here; the others keep the distribution that they have among themselves."""
    logits = random_logits(6, 40, 1)
    padded = np.concatenate([logits, np.full(10, 20, dtype=np.float32)])
    limited, plain = Sampler(neutral(seed=7, **fields), 50, 40), Sampler(neutral(seed=7, **fields), 40)
    limited.observe(np.array([3, 5, 49]))  # a prompt may hold any id of the model
    plain.observe(np.array([3, 5]))
    for found, wanted in zip(limited.distribution(padded), plain.distribution(logits), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert [limited.sample(padded) for _ in range(30)] == [plain.sample(logits) for _ in range(30)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_engine_error(value: float, temperature: float) -> None:
    logits = np.zeros(10, dtype=np.float32)
    logits[3] = value
    with pytest.raises(EngineError, match="1 of 10 logits are NaN or infinite"):
        Sampler(neutral(temperature=temperature), 10).sample(logits)


def test_logits_of_another_shape_are_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"shape \(1, 10\): expected \(10,\)"):
        Sampler(neutral(), 10).sample(np.zeros((1, 10), dtype=np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 2.0, True, "5")),
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None, 10**400)),
        *(("top_p", value) for value in (0, 1.01, -1, math.nan)),
        *(("top_k", value) for value in (0, -1, 1.5)),
        *(("min_p", value) for value in (-0.01, 1.01)),
        *(("repetition_penalty", value) for value in (0, -1, math.inf)),
        *(("seed", value) for value in (-1, 1.0, "x")),
        *(("stop", value) for value in ("end", ["end"], ("",), (1,))),
        *(("thinking_budget", value) for value in (-1, 1.0)),
        *(("prefill_chunk", value) for value in (0, None)),
    ],
)
def test_options_are_checked(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{field} is .*: give "):
        GenerateOptions(**{field: value})


def test_options_at_their_limits() -> None:
    GenerateOptions(max_tokens=1, temperature=0, top_p=1, top_k=1, min_p=1, seed=2**64, stop=("x",), thinking_budget=0)
