"""Log-probabilities through OpenAI's own client: in its form, with the text that they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

QUESTION = [{"role": "user", "content": "How much is 3+53?"}]


@pytest.fixture(scope="module")
def client(serve: Callable[..., Any]) -> Any:
    return serve().client()


def ask(client: Any, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 60, "logprobs": True} | options
    return client.chat.completions.create(model="demo", messages=QUESTION, **options)


def text_of(tokens: list[Any]) -> str:
    return bytes(byte for token in tokens for byte in token.bytes).decode()


@pytest.mark.parametrize("effort", ["none", "high"])
@pytest.mark.parametrize("count", [None, 0, 20])
def test_the_tokens_are_those_of_the_content(client: Any, effort: str, count: int | None) -> None:
    answer = ask(client, reasoning_effort=effort, **({} if count is None else {"top_logprobs": count}))
    [choice] = answer.choices
    tokens = choice.logprobs.content
    assert text_of(tokens) == choice.message.content != ""
    assert bool(getattr(choice.message, "reasoning_content", None)) == (effort == "high")
    for token in tokens:
        assert token.token == bytes(token.bytes).decode()
        assert token.logprob <= 0
        assert len(token.top_logprobs) == (count or 0)
        if count:  # greedy
            assert token.top_logprobs[0].token == token.token
            assert sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1 + 1e-6


def test_a_stream_tells_the_same(client: Any) -> None:
    ask(client)  # from here on the prompt is in the cache: kernels for one and for many positions round differently
    whole = ask(client, top_logprobs=2, reasoning_effort="high").choices[0].logprobs.content
    streamed = []
    for event in ask(client, top_logprobs=2, reasoning_effort="high", stream=True):
        [choice] = event.choices
        told = choice.logprobs.content if choice.logprobs else []
        assert text_of(told) == (choice.delta.content or "")
        streamed += told
    assert [token.token for token in streamed] == [token.token for token in whole]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in whole], abs=1e-3)


def test_a_schema_leaves_the_model_s_own_probabilities(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [{"never": "said"}]}}}
    [choice] = ask(client, top_logprobs=1, response_format=form).choices
    assert text_of(choice.logprobs.content) == choice.message.content
    assert min(token.logprob for token in choice.logprobs.content) < math.log(0.5)


def test_they_are_not_told_unasked(client: Any) -> None:
    assert ask(client, logprobs=False).choices[0].logprobs is None
    assert all(event.choices[0].logprobs is None for event in ask(client, logprobs=False, stream=True))
