"""Requests that cannot be honoured: the right status, a message that names the thing, and the next request works."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

CHAT = "/v1/chat/completions"
TEXT = [{"role": "user", "content": "How much is 2+2?"}]


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def about(*urls: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve(pixels=100_000, images=2, messages=3, characters=5000, body_bytes=100_000, body_seconds=0.5)


@pytest.fixture(scope="module")
def post(served: Any) -> Any:
    return lambda document, path=CHAT: httpx.post(served.url + path, json=document, timeout=60)


def check_works(served: Any) -> None:
    answer = httpx.post(served.url + CHAT, json={"messages": TEXT, "max_tokens": 1}, timeout=60)
    assert answer.status_code == 200
    assert served.server.service.places.taken == 0


SOUND = png(20, 20)

BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({}, "messages"),
    "messages that are none": ({"messages": "hello"}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "many messages": ({"messages": TEXT * 4}, "messages"),
    "a message that is none": ({"messages": ["hello"]}, "messages[0]"),
    "a long text": ({"messages": [{"role": "user", "content": "a" * 6000}]}, "messages"),
    "a strange role": ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
    "a number as text": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    "a name": ({"messages": [{"role": "user", "content": "?", "name": "Eve"}]}, "messages[0].name"),
    "half a surrogate pair": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    "a thought that is none": (
        {"messages": [{"role": "assistant", "content": "", "reasoning_content": 3}]},
        "messages",
    ),
    "an empty list as thought": (
        {"messages": [{"role": "assistant", "content": "", "reasoning_content": []}]},
        "messages",
    ),
    "tools": ({"messages": TEXT, "tools": [{"type": "function"}]}, "tools"),
    "two answers": ({"messages": TEXT, "n": 2}, "n"),
    "probabilities that may be": ({"messages": TEXT, "logprobs": 1}, "logprobs"),
    "many probabilities": ({"messages": TEXT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "probabilities of nothing": ({"messages": TEXT, "top_logprobs": 1}, "top_logprobs"),
    "a penalty": ({"messages": TEXT, "presence_penalty": 0.5}, "presence_penalty"),
    "an unknown parameter": ({"messages": TEXT, "magic": 1}, "magic"),
    "a hot temperature": ({"messages": TEXT, "temperature": "hot"}, "temperature"),
    "an infinite temperature": ({"messages": TEXT, "temperature": 10**400}, "temperature"),
    "a negative seed": ({"messages": TEXT, "seed": -1}, "seed"),
    "no tokens": ({"messages": TEXT, "max_tokens": 0}, "max_tokens"),
    "two limits": ({"messages": TEXT, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    "an empty stop text": ({"messages": TEXT, "stop": [""]}, "stop"),
    "a stream that may be": ({"messages": TEXT, "stream": "yes"}, "stream"),
    "usage without a stream": ({"messages": TEXT, "stream_options": {"include_usage": True}}, "stream_options"),
    "much effort": ({"messages": TEXT, "reasoning_effort": "huge"}, "reasoning_effort"),
    "efforts that differ": (
        {"messages": TEXT, "reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
        "chat_template_kwargs.enable_thinking",
    ),
    "an unknown form": ({"messages": TEXT, "response_format": {"type": "xml"}}, "response_format.type"),
    "a schema that is none": (
        {"messages": TEXT, "response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
        "response_format.json_schema.schema",
    ),
    "too many pictures": ({"messages": about(*[data_url(SOUND)] * 3)}, "messages"),
    "a patch too many": ({"messages": about(data_url(SOUND)), "max_patches": 10**9}, "max_patches"),
    "a picture of another detail": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "", "detail": "x"}}]}]},
        "messages[0].content[0].image_url.detail",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_refused_by_the_parameter_s_name(served: Any, post: Any, name: str) -> None:
    document, param = BODIES[name]
    answer = httpx.post(
        served.url + CHAT, content=json.dumps(document), headers={"Content-Type": "application/json"}, timeout=60
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert error["message"]
    assert error["code"]
    check_works(served)


PICTURES: dict[str, tuple[Any, str]] = {
    "no base64": ("data:image/png;base64,@@@", "not valid base64"),
    "cut base64": (data_url(SOUND)[:-1], "not valid base64"),
    "no data": ("data:image/png;base64,", "empty"),
    "percent encoding": ("data:image/svg+xml,%3Csvg/%3E", "must begin like"),
    "no picture": (data_url(b"hello, world"), "not an image"),
    "half a picture": (data_url(png(90, 90)[:60]), "damaged or truncated"),
    "a bomb": (data_url(png(3000, 3000)), "the limit is 100000"),
    "a file": ("file:///etc/passwd", "no file"),
    "a path": ("/etc/passwd", "no file"),
    "a host that is not allowed": ("https://pictures.example/a.png", "not fetched from pictures.example"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_refused_by_its_place(served: Any, post: Any, name: str) -> None:
    url, said = PICTURES[name]
    answer = post({"messages": about(data_url(SOUND), url)})
    error = answer.json()["error"]
    where = "messages[0].content[1].image_url"
    assert (answer.status_code, error["param"], error["code"]) == (400, where, "invalid_image"), error
    assert said in error["message"]
    assert "<bytes>" not in error["message"]
    check_works(served)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"temperature": NaN}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 90_000, "application/json", 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"a" * 100_001, "application/json", 413),
    ],
)
def test_a_body_that_is_none(served: Any, content: bytes, kind: str, status: int) -> None:
    answer = httpx.post(served.url + CHAT, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    check_works(served)


def test_a_body_without_end_is_cut_off(served: Any) -> None:
    def pieces() -> Any:
        for _ in range(20):
            yield b" " * 10_000

    answer = httpx.post(served.url + CHAT, content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    check_works(served)


def test_other_paths_and_methods(served: Any) -> None:
    assert httpx.get(served.url + CHAT).status_code == 405
    missing = httpx.get(served.url + "/v1/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    "document", [{}, {"width": 0, "height": 5}, {"width": 3, "height": "x"}, {"width": 3, "depth": 1}]
)
def test_a_cost_of_nothing(post: Any, document: dict[str, Any]) -> None:
    assert post(document, "/v1/images/cost").status_code == 400
