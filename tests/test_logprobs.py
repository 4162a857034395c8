"""Log-probabilities of tokens: those of the logits as they come, and with the answer's text alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import phisight
from phisight.answer import Chunk
from phisight.errors import InputError
from phisight.logprobs import ShownTokens, TokenLogprob, TokenLogprobs, token_logprobs


@pytest.fixture(scope="module")
def model() -> phisight.Model:
    return phisight.load("demo", threads=1)


def test_the_likeliest_come_first_and_of_equals_the_lower_id() -> None:
    logits = np.log(np.array([1, 4, 2, 4, 5], np.float32)) + 7
    found = token_logprobs(logits, 0, 3)
    assert found.drawn.logprob == pytest.approx(math.log(1 / 16), abs=1e-5)
    assert [entry.token_id for entry in found.likeliest] == [4, 1, 3]
    assert math.exp(found.likeliest[0].logprob) == pytest.approx(5 / 16, rel=1e-5)
    assert token_logprobs(logits, 2, 0).likeliest == ()
    everything = token_logprobs(logits, 2, 20).likeliest
    assert sum(math.exp(entry.logprob) for entry in everything) == pytest.approx(1)


def test_extreme_logits_stay_finite() -> None:
    found = token_logprobs(np.array([-3e38, 3e38, 0], np.float32), 0, 3)
    assert all(math.isfinite(entry.logprob) for entry in (found.drawn, *found.likeliest))
    assert found.likeliest[0].logprob == 0


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.data())
def test_a_token_is_told_with_the_character_that_it_begins(pieces: list[str], data: st.DataObject) -> None:
    """Pieces are what each token completes; text is shown later than it is decoded, in other pieces."""
    text = "".join(pieces)
    shown_total = data.draw(st.integers(0, len(text)))
    shown, decoded, told, tokens = 0, 0, [], ShownTokens()
    for number, piece in enumerate(pieces):
        tokens.push(piece, TokenLogprobs(TokenLogprob(number, -1.0), ()))
        decoded += len(piece)
        until = data.draw(st.integers(shown, max(shown, min(decoded, shown_total))))
        told += tokens.pop(text[shown:until])
        shown = until
    told += tokens.pop(text[shown:shown_total])
    begins = [len("".join(pieces[:number])) for number in range(len(pieces))]
    assert [entry.drawn.token_id for entry in told] == [n for n, begin in enumerate(begins) if begin < shown_total]


def answer(model: phisight.Model, question: str, **options: object) -> list[Chunk]:
    mode = options.pop("mode", "nothink")
    chosen = model.options(**{"temperature": 0, "logprobs": 3, "max_tokens": 60} | options)
    return list(model.stream(question, mode=mode, options=chosen))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["nothink", "think"])
def test_they_belong_to_the_text_of_the_answer(model: phisight.Model, mode: str) -> None:
    chunks = answer(model, "How much is 3+53?", mode=mode)
    assert any(chunk.channel == "thought" and chunk.text for chunk in chunks) == (mode == "think")
    for chunk in chunks:
        told = b"".join(model.tokenizer.token_bytes(entry.drawn.token_id) for entry in chunk.logprobs)
        assert told.decode() == (chunk.text if chunk.channel == "answer" else "")
        for entry in chunk.logprobs:  # greedy: the likeliest was taken
            assert entry.likeliest[0] == entry.drawn
            values = [alternative.logprob for alternative in entry.likeliest]
            assert values == sorted(values, reverse=True)
            assert len(values) == 3


def test_what_a_stop_text_cuts_off_is_not_told(model: phisight.Model) -> None:
    whole = "".join(chunk.text for chunk in answer(model, "How much is 3+53?"))
    assert len(whole) > 1
    chunks = answer(model, "How much is 3+53?", stop=(whole[1:],))
    told = b"".join(model.tokenizer.token_bytes(e.drawn.token_id) for chunk in chunks for e in chunk.logprobs)
    assert "".join(chunk.text for chunk in chunks) == whole[0]
    assert whole.startswith(told.decode()) and told.decode().startswith(whole[0])


def test_they_change_nothing_and_are_not_told_unasked(model: phisight.Model) -> None:
    texts = []
    for count in (None, 0, 20):
        chunks = answer(model, "How much is 3+53?", logprobs=count, temperature=2, seed=3, repetition_penalty=1.2)
        texts.append("".join(chunk.text for chunk in chunks))
        told = [entry for chunk in chunks for entry in chunk.logprobs]
        assert bool(told) == (count is not None and bool(texts[-1]))
        assert {len(entry.likeliest) for entry in told} <= {count}
    assert len(set(texts)) == 1


@pytest.mark.parametrize("count", [-1, 21, True, 1.0])
def test_a_number_that_cannot_be_meant(count: object) -> None:
    with pytest.raises(InputError, match="logprobs is"):
        phisight.GenerateOptions(logprobs=count)  # type: ignore[arg-type]
