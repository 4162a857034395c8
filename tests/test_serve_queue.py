"""One engine for many clients: turns, limits, deadlines, clients that leave, and an orderly end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

from phisight.serve.errors import ApiError  # noqa: E402
from phisight.serve.queue import FairQueue, Places  # noqa: E402
from phisight.serve.settings import Limits  # noqa: E402

QUESTION = [{"role": "user", "content": "How much is 3+53?"}]
LONG = {"max_tokens": 10_000}


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for what happens soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=QUESTION, **{"temperature": 0} | options)


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any]) -> Any:
    return serve(queue=4, slots=1)


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.put(item[:1].encode(), item)
    assert queue.drop(b"a", "a2")
    assert not queue.drop(b"a", "a2")
    assert len(queue) == 5
    queue.close()
    assert [queue.take() for _ in range(6)] == ["a1", "b1", "c1", "a3", "c2", None]


def test_a_flood_leaves_places_to_others() -> None:
    places = Places(Limits(queue=8))
    held = [places.take(b"flood", 1) for _ in range(7)]
    with pytest.raises(ApiError) as refused:
        places.take(b"flood", 3)
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "3")
    others = [places.take(name, 1) for name in (b"x", b"y")]
    with pytest.raises(ApiError):
        places.take(b"z", 1)
    for place in (*held, *held, *others):  # a place given back twice counts once
        place.give_back()
    assert places.taken == 0


def test_a_full_queue_says_when_to_come_again(served: Any) -> None:
    client = served.client()
    with served.slowly():
        streams = [ask(client, stream=True, **LONG) for _ in range(4)]  # 5 places, 1 of them for others
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert refused.value.code == "queue_full"
        other = ask(served.client("another"), stream=True, **LONG)
        for stream in (*streams, other):
            stream.close()
        served.until_idle()
    assert ask(client).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(served: Any, stream: bool) -> None:
    client = served.client(timeout=0.5)
    with served.slowly():
        if stream:
            answer = ask(client, stream=True, **LONG)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(client, **LONG)
        served.until_idle()


def test_a_client_that_leaves_the_queue_is_forgotten(served: Any) -> None:
    engine = served.server.service.engine
    with served.slowly():
        running = ask(served.client(), stream=True, **LONG)
        until(lambda: engine.running)
        waiting = ask(served.client("another"), stream=True, **LONG)
        until(lambda: engine.waiting == 1)
        waiting.close()
        until(lambda: engine.waiting == 0)
        assert engine.running
        running.close()
        served.until_idle()


def test_many_clients_at_once_get_their_own_answers(serve: Callable[..., Any]) -> None:
    served = serve(queue=32)
    questions = [f"How much is {a}+{b}?" for a in range(2, 6) for b in (11, 23)]

    def answer(number: int) -> tuple[str, str]:
        message = [{"role": "user", "content": questions[number % len(questions)]}]
        stream = served.client(str(number)).chat.completions.create(
            model="demo", messages=message, temperature=0, stream=True
        )
        return questions[number % len(questions)], "".join(event.choices[0].delta.content or "" for event in stream)

    alone = dict(answer(number) for number in range(len(questions)))
    assert len(set(alone.values())) > 4
    with ThreadPoolExecutor(16) as pool:
        for question, text in pool.map(answer, range(16)):
            assert text == alone[question]
    served.until_idle()


def test_an_answer_has_a_deadline(serve: Callable[..., Any]) -> None:
    served = serve(answer_seconds=0.7)
    with served.slowly():
        with pytest.raises(openai.InternalServerError) as late:
            ask(served.client(), **LONG)
        assert (late.value.status_code, late.value.code) == (504, "deadline")
        texts = []
        with pytest.raises(openai.APIError, match="did not end within"):
            for event in ask(served.client(), stream=True, **LONG):
                texts.append(event.choices[0].delta.content or "")
        assert "".join(texts)
        served.until_idle()
    assert ask(served.client()).choices[0].finish_reason == "stop"


def test_an_engine_that_fails_goes_on(served: Any) -> None:
    decoder = served.model._decoder

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    decoder.prefill = broken
    try:
        with pytest.raises(openai.InternalServerError) as failed:
            ask(served.client())
        assert "secret" not in str(failed.value)
        with pytest.raises(openai.APIError):
            list(ask(served.client(), stream=True))
    finally:
        del decoder.prefill
    assert ask(served.client()).choices[0].finish_reason == "stop"
    served.until_idle()


@pytest.mark.parametrize("grace", [60.0, 0.3])
def test_an_end_lets_answers_end_or_says_that_it_breaks_them_off(serve: Callable[..., Any], grace: float) -> None:
    served = serve(grace_seconds=grace)
    seen: list[Any] = []

    def read() -> None:
        try:
            for event in ask(served.client(), stream=True, max_tokens=60 if grace > 1 else 10_000):
                seen.append(event.choices[0].finish_reason)
        except openai.APIError as error:
            seen.append(error)

    with served.slowly():
        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: len(seen) > 3)
        served.server.should_exit = True
        reader.join(30)
    if grace > 1:
        assert seen[-1] == "length"
    else:
        assert "stopping" in str(seen[-1])
    until(lambda: not served.server.service.engine.alive)
    with pytest.raises(OSError):
        socket.create_connection((served.host, served.port), timeout=1)
