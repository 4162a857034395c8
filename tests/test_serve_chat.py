"""The server through OpenAI's own client package: what is asked for is what comes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import phisight
from phisight.naflex import token_count
from phisight.prompt import user_message

openai = pytest.importorskip("openai")

PICTURES = Path(phisight.__file__).parent / "demo/pictures"
QUESTION = "What is the value of the orange bar?"


def picture(name: str, **more: str) -> dict[str, Any]:
    data = base64.b64encode((PICTURES / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", **more}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve()


@pytest.fixture(scope="module")
def client(served: Any) -> Any:
    return served.client()


@pytest.fixture(scope="module")
def model() -> phisight.Model:
    return phisight.load("demo", threads=1)


def ask(client: Any, *messages: dict[str, Any], **options: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=list(messages), **{"temperature": 0} | options)


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_an_answer_is_the_model_s(client: Any, model: phisight.Model) -> None:
    answer = ask(client, user("What does the text say?", picture("price.png")))
    alone = model.generate("What does the text say?", [PICTURES / "price.png"], options=model.options(temperature=0))
    assert text_of(answer) == alone.text == "$6.75"
    assert answer.choices[0].finish_reason == alone.finish_reason == "stop"
    usage = answer.usage
    assert usage.prompt_tokens == alone.stats.text_tokens + alone.stats.image_tokens
    assert usage.completion_tokens == alone.stats.generated_tokens
    assert usage.prompt_tokens_details.image_tokens == alone.stats.image_tokens
    assert answer.phisight["stats"]["images"] == 1


@pytest.mark.parametrize("effort", ["high", "none"])
def test_a_stream_says_the_same(client: Any, effort: str) -> None:
    question = user(picture("chart.png"), QUESTION)
    whole = ask(client, question, reasoning_effort=effort)
    events = list(ask(client, question, reasoning_effort=effort, stream=True, stream_options={"include_usage": True}))
    deltas = [event.choices[0].delta for event in events if event.choices]
    assert deltas[0].role == "assistant"
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert "".join(delta.content or "" for delta in deltas) == text_of(whole)
    assert thought == getattr(whole.choices[0].message, "reasoning_content", "")
    assert bool(thought) == (effort == "high")
    assert len(deltas) > (3 if thought else 2)
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "stop"
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    assert {event.id for event in events} == {events[0].id}


def test_without_being_asked_for_a_stream_has_no_usage(client: Any) -> None:
    assert all(event.usage is None and event.choices for event in ask(client, user("How much is 2+2?"), stream=True))


def test_two_pictures_in_their_order(client: Any, model: phisight.Model) -> None:
    names = ["price.png", "chart.png"]
    for order in (names, names[::-1]):
        answer = ask(client, user(*map(picture, order), "What does the text say?"), reasoning_effort="none")
        images = [PICTURES / name for name in order]
        options = model.options(temperature=0)
        alone = model.generate("What does the text say?", images, options=options, mode="nothink")
        assert text_of(answer) == alone.text
        assert answer.usage.prompt_tokens_details.image_tokens == alone.stats.image_tokens


def test_text_around_a_picture_keeps_its_place(client: Any, model: phisight.Model) -> None:
    answer = ask(client, user("Here is a text.", picture("price.png"), "What does the text say?"))
    parts = [{"type": "text", "text": "Here is a text."}, *user_message("What does the text say?", 1)["content"]]
    prompt = model.prompt([{"role": "user", "content": parts}], 1)
    assert answer.usage.prompt_tokens == len(prompt.ids) - 1 + answer.usage.prompt_tokens_details.image_tokens


def test_stop_text_and_limit(client: Any) -> None:
    question = user(picture("price.png"), "What does the text say?")
    stopped = ask(client, question, stop=["."])
    assert (text_of(stopped), stopped.choices[0].finish_reason) == ("$6", "stop")
    cut = ask(client, question, max_completion_tokens=2)
    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (2, "length")


def test_a_seed_names_an_answer(client: Any) -> None:
    def drawn(seed: int) -> str:
        return text_of(ask(client, user("How much is 3+53?"), temperature=10, top_p=1, seed=seed, max_tokens=12))

    drawn(0)  # from here on the prompt is in the cache: kernels for one and for many positions round differently
    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(6)}) > 1


def test_a_thought_has_its_budget(client: Any) -> None:
    question = user(picture("chart.png"), QUESTION)
    free = ask(client, question, reasoning_effort="high")
    short = ask(client, question, extra_body={"chat_template_kwargs": {"enable_thinking": True, "thinking_budget": 1}})
    assert free.usage.completion_tokens_details.reasoning_tokens > 1
    assert short.usage.completion_tokens_details.reasoning_tokens == 1
    none = ask(client, question, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert not hasattr(none.choices[0].message, "reasoning_content")


@pytest.mark.parametrize("effort", ["none", "high"])
def test_a_second_question_pays_for_its_own_tokens(client: Any, effort: str) -> None:
    question = user(picture("chart.png"), QUESTION)
    first = ask(client, question, reasoning_effort=effort)
    said = {"role": "assistant", "content": text_of(first)}
    if effort == "high":
        said["reasoning_content"] = first.choices[0].message.reasoning_content
    second = ask(client, question, said, user("And the text?"), reasoning_effort=effort)
    details = second.usage.prompt_tokens_details
    assert details.cached_tokens == first.usage.total_tokens
    assert second.phisight["stats"]["cached_images"] == 1


def test_a_thought_that_is_not_sent_back_is_not_in_the_prompt(client: Any) -> None:
    question = user(picture("chart.png"), QUESTION)
    first = ask(client, question, reasoning_effort="high")
    second = ask(client, question, {"role": "assistant", "content": text_of(first)}, user("And?"))
    details = second.usage.prompt_tokens_details
    assert details.image_tokens < details.cached_tokens < first.usage.total_tokens


def test_conversations_that_take_turns_keep_their_caches(client: Any) -> None:
    questions = [user(picture(name), "What is here?") for name in ("chart.png", "price.png")]
    firsts = [ask(client, question, reasoning_effort="none") for question in questions]
    for question, first in zip(questions, firsts, strict=True):
        said = {"role": "assistant", "content": text_of(first)}
        second = ask(client, question, said, user("And?"), reasoning_effort="none")
        assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


def test_an_answer_of_a_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 2]}},
        "required": ["text", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = ask(client, user(picture("price.png"), "What does the text say?"), response_format=form, temperature=1)
    document = json.loads(text_of(answer))
    assert set(document) == {"text", "n"}
    assert document["n"] in (1, 2)


def test_a_schema_that_cannot_be_used_is_refused(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        ask(client, user("How much is 2+2?"), response_format=form)


def test_a_system_message_is_noted(client: Any) -> None:
    answer = ask(client, {"role": "developer", "content": "Be exact."}, user("How much is 2+2?"))
    assert any("system message" in note for note in answer.phisight["notes"])


def test_models(client: Any) -> None:
    assert [entry.id for entry in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").context_length > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="demo"):
        client.chat.completions.create(model="gpt-4", messages=[user("?")])


def test_health_metrics_and_the_cost_of_a_picture(served: Any, client: Any) -> None:
    import httpx

    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    answer = ask(client, user(picture("price.png"), "What does the text say?"))
    cost = httpx.post(f"{served.url}/v1/images/cost", json={"width": 1000, "height": 30}).json()
    budget = served.model.budget
    assert cost["tokens"] == token_count(1000, 30, budget.max_patches, budget.min_patches)
    assert cost["prefill_seconds"] > 0
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['phisight_answers_total{finish_reason="stop"}']) >= 1
    image_tokens = answer.usage.prompt_tokens_details.image_tokens
    assert float(values['phisight_prompt_tokens_total{kind="image"}']) >= image_tokens
    assert float(values["phisight_kv_cache_positions"]) > 0
    assert float(values["phisight_requests_held"]) == 0


def test_detail_low_takes_the_fewest_patches(client: Any, served: Any) -> None:
    def cost(**more: str) -> int:
        return int(
            ask(client, user(picture("chart.png", **more), "?"), max_tokens=1).usage.prompt_tokens_details.image_tokens
        )

    assert cost(detail="low") <= min(cost(), served.model.budget.min_patches)
