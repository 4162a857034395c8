"""Types for groups of weights: against every combination, and what cannot be met."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phisight.errors import InputError
from phisight.quant import allocation
from phisight.quant.allocation import Allocation, Choice, Frontier

Groups = dict[str, list[Choice]]

CHOICES = st.builds(Choice, st.text("abc", min_size=1, max_size=2), st.integers(1, 60), st.integers(0, 50).map(float))
GROUPS = st.dictionaries(st.sampled_from("pqrst"), st.lists(CHOICES, min_size=1, max_size=4), min_size=1, max_size=4)


def _all(groups: Groups) -> list[Allocation]:
    return [Allocation(dict(zip(groups, chosen, strict=True))) for chosen in product(*groups.values())]


@given(GROUPS, st.integers(0, 260))
def test_the_least_divergence_within_bytes(groups: Groups, limit: int) -> None:
    fitting = [each.kld for each in _all(groups) if each.bytes <= limit]
    if not fitting:
        with pytest.raises(InputError, match=f"wanted at most {limit}"):
            Frontier(groups).within_bytes(limit)
        return
    found = Frontier(groups).within_bytes(limit)
    assert found.bytes <= limit
    assert found.kld == min(fitting)
    assert all(found.choices[name] in choices for name, choices in groups.items())
    assert list(found.choices) == list(groups)


@given(GROUPS, st.integers(0, 220))
def test_the_fewest_bytes_within_a_divergence(groups: Groups, limit: int) -> None:
    fitting = [each.bytes for each in _all(groups) if each.kld <= limit]
    if not fitting:
        with pytest.raises(InputError, match="KL divergence"):
            Frontier(groups).within_kld(limit)
        return
    found = Frontier(groups).within_kld(limit)
    assert found.kld <= limit
    assert found.bytes == min(fitting)


@given(GROUPS, st.integers(0, 260))
def test_a_coarse_table_never_takes_more_than_the_limit(groups: Groups, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MOST_SUMS", 5)
        frontier = Frontier(groups)
    least = min(each.bytes for each in _all(groups))
    if limit < least:
        return
    found = frontier.within_bytes(limit)
    assert found.bytes <= limit
    assert found.kld <= min(each.kld for each in _all(groups) if each.bytes == least)


def test_sizes_of_the_real_model_are_told_apart() -> None:
    """40 layers of four matrices in five types: sums of bytes have a common divisor large enough for an exact table."""
    shapes = [(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920)]
    bits = {"Q3_K": 110, "Q4_0": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 272}
    groups = {
        f"{layer}.{number}": [
            Choice(name, rows * columns // 256 * size, (1 + layer % 7 + number) / size**3)
            for name, size in bits.items()
        ]
        for layer in range(40)
        for number, (rows, columns) in enumerate(shapes)
    }
    weights = sum(rows * columns for rows, columns in shapes) * 40
    limit = weights * 4.6 / 8
    found = Frontier(groups).within_bytes(limit)
    assert limit - 40e6 < found.bytes <= limit
    assert len({choice.type for choice in found.choices.values()}) > 2
