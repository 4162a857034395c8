"""Answers of a form through the server: under sampling, with prompt lookup, with thoughts, streamed and whole."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import phisight

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

PRICE = Path(phisight.__file__).parent / "demo/pictures/price.png"
URL = "data:image/png;base64," + base64.b64encode(PRICE.read_bytes()).decode()
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"text": {"type": "string", "maxLength": 8}, "again": {"type": "string", "maxLength": 8}},
        "required": ["text", "again"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", None, 3]}, "minItems": 2, "maxItems": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    {"anyOf": [{"const": "yes"}, {"type": "integer", "minimum": 0, "maximum": 99}]},
]
EFFORTS = (None, "none", "high")


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve()


@pytest.fixture(params=[False, True], ids=["plain", "lookup"])
def lookup(served: Any, request: pytest.FixtureRequest) -> bool:
    """As with and without `phisight serve --prompt-lookup`."""
    service = served.server.service
    service._defaults = replace(service._defaults, prompt_lookup=request.param)
    return bool(request.param)


def ask(client: Any, number: int, schema: dict[str, Any]) -> dict[str, Any]:
    """One of many questions of all kinds; its message and stats."""
    parts = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What does the text say?"}]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "temperature": (0.8, 1, 3, 10)[number % 4],
        "top_p": 1,
        "seed": number,
        "thinking_budget": 8,
        "reasoning_effort": EFFORTS[number % 3],
        "stream": number % 2 == 0,
    }
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return said_in(answer)


def said_in(answer: Any) -> dict[str, Any]:
    """content, finish_reason, stats and notes of an answer or of a stream's events."""
    if answer.headers["content-type"] == "application/json":
        document = answer.json()
        choice = document["choices"][0]
        said = choice["message"] | {"finish_reason": choice["finish_reason"]}
    else:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
        document = events[-1]
        texts = [event["choices"][0]["delta"].get("content", "") for event in events]
        said = {"content": "".join(texts), "finish_reason": document["choices"][0]["finish_reason"]}
    return said | document["phisight"]


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.soak)])
def test_whatever_is_drawn_fits_its_schema(served: Any, lookup: bool, count: int) -> None:
    texts, drafted = set(), 0
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for number in range(count):
            schema = SCHEMAS[number // 3 % len(SCHEMAS)]
            said = ask(client, number, schema)
            assert said["finish_reason"] == "stop", said
            jsonschema.validate(json.loads(said["content"]), schema, jsonschema.Draft202012Validator)
            texts.add(said["content"])
            drafted += said["stats"]["drafted_tokens"]
    print(f"{count} answers fit, {len(texts)} differ, {drafted} tokens drafted")
    assert len(texts) > count // 3  # the model chooses
    assert lookup or drafted == 0


def test_drafts_under_a_schema_are_kept_only_where_they_fit(served: Any, lookup: bool) -> None:
    """Two fields that say the same: the second is guessed from the first, and the answer is the same as without."""
    schema = {
        "type": "object",
        "properties": {name: {"const": "twelve red apples and twelve red pears"} for name in ("first", "second")},
        "required": ["first", "second"],
        "additionalProperties": False,
    }
    with httpx.Client(base_url=served.url, timeout=60) as client:
        said = ask(client, 4, schema)
    jsonschema.validate(json.loads(said["content"]), schema, jsonschema.Draft202012Validator)
    assert (said["stats"]["drafted_tokens"] > 0) == lookup


@pytest.mark.parametrize("stream", [False, True])
def test_json_that_was_cut_says_so(served: Any, stream: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": "How much is 2+2?"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[0]}},
        "max_tokens": 3,
        "stream": stream,
    }
    said = said_in(httpx.post(f"{served.url}/v1/chat/completions", json=body | {"reasoning_effort": "none"}))
    assert said["finish_reason"] == "length"
    assert any("JSON" in note and "incomplete" in note for note in said["notes"])
    whole = said_in(httpx.post(f"{served.url}/v1/chat/completions", json=body | {"max_tokens": 100}, timeout=60))
    assert whole["finish_reason"] == "stop" and whole["notes"] == []


def test_json_object_under_lookup_is_an_object_or_its_beginning(served: Any, lookup: bool) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for seed in range(4):
            body = {
                "messages": [{"role": "user", "content": 'Say {"a": 1, "b": {"a": 1}}'}],
                "response_format": {"type": "json_object"},
                "temperature": 2,
                "seed": seed,
                "max_tokens": 40,
                "reasoning_effort": "none",
            }
            choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
            if choice["finish_reason"] == "stop":
                assert isinstance(json.loads(choice["message"]["content"]), dict)
            else:
                assert choice["message"]["content"].startswith("{")
