"""The server under strain: anything as a body, clients that leave at random, many pictures, memory."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import phisight
from phisight import tasks

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

CHAT = "/v1/chat/completions"
LONG = pytest.mark.soak


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def drawn(seed: int) -> Image.Image:
    """A picture that no other seed gives."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((96, 64), Image.Resampling.NEAREST)


def about(url: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What does the text say?"}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve(queue=32, max_tokens=8, pixels=100_000)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
URL = st.sampled_from(
    ["data:image/png;base64,", data_url(drawn(1))[:60], data_url(drawn(1)), "file:///", "http://[", ""]
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "x"])},
    optional={
        "text": st.text(max_size=9) | ANYTHING,
        "image_url": ANYTHING | st.fixed_dictionaries({"url": URL | ANYTHING}),
    },
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | ANYTHING},
    optional={"content": st.text(max_size=9) | st.lists(PART, max_size=3) | ANYTHING, "reasoning_content": ANYTHING},
)
NAMES = [
    *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "stream"),
    *("stream_options", "n", "response_format", "logprobs", "reasoning_effort", "chat_template_kwargs", "max_patches"),
    *("thinking_budget", "tools", "logit_bias", "user", "presence_penalty", "zzz"),
]
SOUND = st.sampled_from(
    [0, 1, 0.5, True, "demo", "high", [], {}, ["a"], {"type": "json_object"}, {"include_usage": True}]
)
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | ANYTHING},
    optional=dict.fromkeys(NAMES, SOUND | ANYTHING),
)


@pytest.mark.parametrize("examples", [60, pytest.param(5000, marks=LONG)])
def test_nothing_is_worse_than_a_refusal(served: Any, examples: int) -> None:
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=served.url, timeout=60, headers={"Content-Type": "application/json"}) as client:

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(BODY)
        def post(body: Any) -> None:
            answer = client.post(CHAT, content=json.dumps(body))
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
            elif answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.text.endswith("data: [DONE]\n\n"), answer.text

        post()
    print(statuses)
    served.until_idle(20)


@pytest.mark.parametrize("count", [25, pytest.param(100, marks=LONG)])
def test_clients_that_leave_at_any_moment(served: Any, count: int) -> None:
    chance = random.Random(7)

    def leave(number: int) -> None:
        body = about(data_url(drawn(number))) | {"stream": chance.random() < 0.5, "max_tokens": 8}
        with suppress(httpx.TimeoutException):
            httpx.post(served.url + CHAT, json=body, timeout=httpx.Timeout(60, read=chance.uniform(0.001, 0.4)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(count)))
    served.until_idle(20)
    assert httpx.post(served.url + CHAT, json=about(data_url(drawn(0))), timeout=60).status_code == 200


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=LONG)])
def test_every_answer_belongs_to_its_picture(serve: Callable[..., Any], rounds: int) -> None:
    """16 clients read 16 codes at once; each gets what the model says alone, where it misreads, too."""
    codes = [sample for seed in range(300) if (sample := tasks.sample("read", seed)).question.kind == "code"][:16]
    alone = phisight.load("demo", threads=1)
    options = alone.options(temperature=0, max_tokens=40)
    wanted = []
    for code in codes:
        pictures = [Image.fromarray(pixels) for pixels in code.pictures]
        wanted.append(alone.generate(code.question.text, pictures, mode="nothink", options=options).text)
    assert len(set(wanted)) == 16
    served = serve(queue=32, slots=3)

    def ask(number: int) -> str:
        code = codes[number]
        parts = [{"type": "image_url", "image_url": {"url": data_url(Image.fromarray(p))}} for p in code.pictures]
        parts.append({"type": "text", "text": code.question.text})
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 40}
        headers = {"Authorization": f"Bearer {number}"}
        body |= {"reasoning_effort": "none", "stream": number % 2 == 0}
        answer = httpx.post(served.url + CHAT, json=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return said_in(answer)

    with ThreadPoolExecutor(16) as pool:
        for _ in range(rounds):
            assert list(pool.map(ask, range(16))) == wanted
    right = sum(said == code.question.answer for said, code in zip(wanted, codes, strict=True))
    print(f"{right} of 16 codes read rightly")


def said_in(answer: Any) -> str:
    """The content of an answer, or of a stream's events."""
    if answer.headers["content-type"] == "application/json":
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line][:-1]
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


@pytest.mark.soak
def test_memory_stays_flat(served: Any) -> None:
    process = psutil.Process()
    held = []
    for number in range(500):
        answer = httpx.post(served.url + CHAT, json=about(data_url(drawn(number))), timeout=60)
        assert answer.status_code == 200
        held.append(process.memory_info().rss / 2**20)
    features = served.model.feature_bytes / 2**20
    slope = np.polyfit(np.arange(250), held[250:], 1)[0]
    print(f"{held[0]:.0f}, {held[250]:.0f}, {held[-1]:.0f} MiB; {slope:.4f} a request; {features:.0f} of features")
    assert slope * 250 < features + 10
