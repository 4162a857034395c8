"""An answer on its way to the client: one JSON document, or events (SSE) as the tokens come.

The client's connection is watched meanwhile: when it closes, the job is cancelled.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from phisight.answer import Answer, Chunk, Stats
from phisight.errors import AnswerError
from phisight.generate import FinishReason
from phisight.grounding import locate
from phisight.logprobs import TokenLogprobs
from phisight.serve.engine import Job
from phisight.serve.errors import api_error, error_response
from phisight.serve.logprobs import logprobs_document
from phisight.serve.requests import ChatRequest
from phisight.tokenizer import Tokenizer

__all__ = ["Ended", "Reply"]

Ended = Callable[[str, str, Stats | None], None]
"""Told how an answer ended, its text, and its counts: a finish reason, "disconnect" or an error's code."""

_KEEP_ALIVE_SECONDS = 10.0
_SENDING_SECONDS = 30.0  # behind the deadline, for a client that reads slowly
INCOMPLETE = "the limit of tokens was reached before the end of the JSON, which is incomplete: raise max_tokens"
_FIELDS = {"thought": "reasoning_content", "answer": "content"}


class Reply:
    """ASGI response to one chat request."""

    def __init__(
        self,
        request: ChatRequest,
        sizes: Sequence[tuple[int, int]],
        job: Job,
        notes: tuple[str, ...],
        ended: Ended,
        tokenizer: Tokenizer,
    ) -> None:
        """`sizes` are those of the upright pictures, (width, height) in pixels."""
        self._request = request
        self._sizes = sizes
        self._tokenizer = tokenizer
        self._job = job
        self._notes = notes
        self._ended = ended
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._texts = {"thought": "", "answer": ""}
        self._logprobs: list[TokenLogprobs] = []
        self._end = "disconnect"
        self._stats: Stats | None = None
        self._finished = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = self._stream(send) if self._request.stream else self._whole(scope, receive, send)
        writer = asyncio.create_task(write)
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            seconds = self._job.seconds_left + _SENDING_SECONDS
            await asyncio.wait((writer, watcher), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        except OSError:  # the connection broke while something was written
            self._end = "disconnect"
        finally:
            for task in (writer, watcher):
                task.cancel()
            await asyncio.gather(writer, watcher, return_exceptions=True)
            self._finish()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for chunk in self._job.chunks():
                self._note(chunk)
        except Exception as error:
            told = api_error(error)
            self._end = told.code or "error"
            self._finish()
            await error_response(told)(scope, receive, send)
            return
        self._finish()
        message = {"role": "assistant", "content": self._texts["answer"], "refusal": None}
        if self._texts["thought"]:
            message["reasoning_content"] = self._texts["thought"]
        choice = {"index": 0, "message": message, "finish_reason": self._end, "logprobs": self._told_of(self._logprobs)}
        document = self._document("chat.completion", [choice]) | self._told()
        await JSONResponse(document | {"usage": self._usage()})(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        keeper = asyncio.create_task(_keep_alive(send))
        try:
            await self._event(send, self._piece({"role": "assistant", "content": ""}))
            async for chunk in self._job.chunks():
                self._note(chunk)
                keeper.cancel()
                if chunk.text:
                    delta = {_FIELDS[chunk.channel]: chunk.text}
                    await self._event(send, self._piece(delta, logprobs=chunk.logprobs))
            await self._event(send, self._piece({}, self._end) | self._told())
            if self._request.include_usage:
                await self._event(send, self._document("chat.completion.chunk", []) | {"usage": self._usage()})
            self._finish()
            await send(_body(b"data: [DONE]\n\n", more=True))
        except OSError:
            raise
        except Exception as error:  # the status is sent already: the error is an event
            told = api_error(error)
            self._end = told.code or "error"
            await self._event(send, told.as_json())
        finally:
            keeper.cancel()
        self._finish()
        await send(_body(b"", more=False))

    def _finish(self) -> None:
        """Tell the end, once; before the client can know it, so that it finds a place for its next request."""
        if not self._finished:
            self._finished = True
            self._ended(self._end, self._texts["answer"], self._stats)

    def _note(self, chunk: Chunk) -> None:
        self._texts[chunk.channel] += chunk.text
        self._logprobs += chunk.logprobs
        if chunk.finish_reason is not None:
            self._end, self._stats = chunk.finish_reason, chunk.stats

    def _piece(
        self, delta: dict[str, str], finish_reason: str | None = None, logprobs: Sequence[TokenLogprobs] = ()
    ) -> dict[str, Any]:
        told = self._told_of(logprobs) if logprobs else None
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": told}
        document = self._document("chat.completion.chunk", [choice])
        return document | {"usage": None} if self._request.include_usage else document

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _told(self) -> dict[str, Any]:
        """What OpenAI's form has no place for: counts, stage times in seconds, notes, the box that was asked for."""
        assert self._stats is not None, "an answer that ended has its counts"
        told: dict[str, Any] = {"stats": self._stats.as_json(), "notes": list(self._notes)}
        constraint = self._request.options.constraint
        if self._request.wants_box:
            grounding, notes = self._grounding(self._stats)
            told |= {"grounding": grounding, "notes": [*self._notes, *notes]}
        elif constraint is not None and self._end == "length":
            told["notes"].append(INCOMPLETE)
        return {"phisight": told}

    def _grounding(self, stats: Stats) -> tuple[dict[str, object] | None, tuple[str, ...]]:
        """Where the box lies in the one picture, and notes; None for an answer that was cut."""
        reason: FinishReason = "length" if self._end == "length" else "stop"
        answer = Answer(self._texts["answer"], self._texts["thought"], reason, stats)
        try:
            found = locate(answer, self._sizes[0])
        except AnswerError as error:
            return None, (str(error),)
        return found.as_json(), found.notes

    def _told_of(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """None unless the request asks for them."""
        return None if self._request.options.logprobs is None else logprobs_document(logprobs, self._tokenizer)

    def _usage(self) -> dict[str, Any]:
        stats = self._stats
        assert stats is not None, "an answer that ended has its counts"
        prompt = stats.text_tokens + stats.image_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": stats.generated_tokens,
            "total_tokens": prompt + stats.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": stats.reused_positions, "image_tokens": stats.image_tokens},
            "completion_tokens_details": {"reasoning_tokens": stats.thought_tokens},
        }

    async def _event(self, send: Send, document: dict[str, Any]) -> None:
        await send(_body(b"data: " + json.dumps(document).encode() + b"\n\n", more=True))


def _body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _keep_alive(send: Send) -> None:
    """Comments until the first token, or proxies take the connection for dead."""
    with suppress(OSError):
        while True:
            await asyncio.sleep(_KEEP_ALIVE_SECONDS)
            await send(_body(b": waiting\n\n", more=True))


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone. The body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
