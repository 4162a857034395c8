"""Several KV caches of one model: which one a request goes to, and that none disturbs another."""

from __future__ import annotations

import numpy as np
import pytest

import phisight
from phisight.errors import EngineError


@pytest.fixture
def model() -> phisight.Model:
    model = phisight.load("demo", threads=1)
    model.use_slots(2)
    return model


def reused(model: phisight.Model, ids: list[int]) -> int:
    """Positions of the ids that were in a cache; one token is drawn."""
    generation = model.generate_tokens(ids, options=model.options(temperature=0, max_tokens=1))
    assert len(list(generation)) <= 1
    return generation.timings.reused_positions


def test_conversations_that_take_turns(model: phisight.Model) -> None:
    first, second = [20 + n % 5 for n in range(40)], [30 + n % 5 for n in range(30)]
    assert (reused(model, first), reused(model, second)) == (0, 0)
    assert reused(model, [*first, 21]) == len(first)
    assert reused(model, [*second, 31]) == len(second)
    assert model.cached_positions >= len(first) + len(second)


def test_a_third_one_takes_the_place_of_the_oldest(model: phisight.Model) -> None:
    first, second, third = ([start + n % 5 for n in range(30)] for start in (20, 30, 40))
    for ids in (first, second, third):
        assert reused(model, ids) == 0
    assert reused(model, [*second, 31]) == len(second)
    assert reused(model, [*third, 41]) == len(third)
    assert reused(model, [*first, 21]) == 0


def test_a_short_common_beginning_does_not_cost_a_long_conversation(model: phisight.Model) -> None:
    opening = [20, 21, 22]
    long = [*opening, *(30 + n % 5 for n in range(60))]
    assert reused(model, long) == 0
    assert reused(model, [*opening, 40, 41]) == 0  # in the other slot
    assert reused(model, [*long, 31]) == len(long)


def test_answers_do_not_depend_on_the_slots(model: phisight.Model) -> None:
    alone = phisight.load("demo", threads=1)
    questions = [f"How much is {n}+5?" for n in range(3)] * 2
    for question in questions:
        options = model.options(temperature=0)
        assert model.generate(question, options=options).text == alone.generate(question, options=options).text


def test_another_answer_ends_the_one_before(model: phisight.Model) -> None:
    options = model.options(temperature=0, max_tokens=5)
    older = model.generate_tokens([20, 21], options=options)
    next(older)
    list(model.generate_tokens([30, 31], options=options))
    with pytest.raises(EngineError, match="another request"):
        list(older)


def test_forgetting_and_scoring(model: phisight.Model) -> None:
    ids = [20, 21, 22, 23]
    before = model.score(ids)
    reused(model, ids)
    assert np.array_equal(model.score(ids), before)
    model._decoder.forget()
    assert model.cached_positions == 0
