"""The application: its routes, and how a chat request becomes an answer."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phisight.answer import Stats
from phisight.constraint_llguidance import is_installed
from phisight.errors import PhisightError
from phisight.model import Model
from phisight.naflex import Patches
from phisight.serve.body import read_json
from phisight.serve.costs import Costs
from phisight.serve.engine import Engine, Job
from phisight.serve.errors import ApiError, api_error, error_response
from phisight.serve.guard import Guard, client_of
from phisight.serve.memory import Memory
from phisight.serve.metrics import Metrics
from phisight.serve.openapi import openapi_document
from phisight.serve.page_files import PageFiles, page
from phisight.serve.pictures import Pictures
from phisight.serve.queue import Place, Places
from phisight.serve.reply import Reply
from phisight.serve.requests import ChatRequest, read_chat
from phisight.serve.settings import ServeSettings
from phisight.tasks.ground import PROMPT

__all__ = ["Service"]

PATHS = ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/images/cost", "/openapi.json", "/")

# Pictures that are opened at a time: each takes the memory of its pixels.
_OPENED_AT_ONCE = 2

log = logging.getLogger("phisight.serve")


class Service:
    """One model behind an ASGI application, `app`."""

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        """Raises EngineError where the engine cannot keep that many slots."""
        model.use_slots(settings.slots)
        self.engine = Engine()
        self.places = Places(settings.limits)
        self._model = model
        self._settings = settings
        self._defaults = model.options()
        self._pictures = Pictures(model, settings.access, settings.limits)
        self._memory = Memory(model)
        self._costs = Costs(model)
        self._created = int(time.time())
        self._opening = CapacityLimiter(_OPENED_AT_ONCE)
        self._preparing = CapacityLimiter(1)
        self._metrics = Metrics()
        self._measure()
        routes: list[BaseRoute] = [
            Route("/health", self._health),
            Route("/metrics", self._tell_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/images/cost", self._cost, methods=["POST"]),
            Route("/openapi.json", self._openapi),
            Route("/", page),
            Mount("/page", PageFiles()),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _on_error,
            HTTPException: _on_http_error,
            PhisightError: _on_error,
            MemoryError: _on_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_error,
        }
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app: ASGIApp = _Logged(Guard(starlette, settings.access), self._metrics)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        with self.engine:
            yield

    # answers

    async def _chat(self, request: Request) -> Reply:
        client = client_of(request.scope)
        place = self.places.take(client, self._costs.retry_after(self.places.taken))
        job = Job(client, self._settings.limits.answer_seconds)
        try:
            body = await read_json(request, self._settings.limits)
            asked = read_chat(body, self._settings, self._defaults)
            sizes, notes = await self._prepare(asked, job)
        except BaseException:
            place.give_back()
            raise
        self.engine.submit(job)
        return Reply(asked, sizes, job, notes, partial(self._ended, job, place), self._model.tokenizer)

    async def _prepare(self, asked: ChatRequest, job: Job) -> tuple[list[tuple[int, int]], tuple[str, ...]]:
        """All that can be refused, before the request is queued; the pictures' sizes and the prompt's notes.

        Raises ApiError.
        """
        started = time.perf_counter()
        opened: list[Patches] = []
        for picture in asked.pictures:
            opened.append(await run_sync(self._pictures.open, picture, asked.max_patches, limiter=self._opening))
        seconds = time.perf_counter() - started

        def prompt() -> tuple[str, ...]:
            question = self._memory.question(job.client, asked.messages, len(opened), asked.mode)
            chunks = self._model.stream_prompt(
                question.prompt, opened, asked.options, preprocess_seconds=seconds, cancel=job.should_stop
            )
            # A stop text is among the ids that were drawn, but was not said.
            job.work = chunks if asked.options.stop else self._memory.noting(question, chunks)
            return question.prompt.notes

        notes = await run_sync(prompt, limiter=self._preparing)
        if self._settings.log_content:
            log.info("messages: %s", json.dumps(asked.messages))
        return [patches.original_size for patches in opened], notes

    def _ended(self, job: Job, place: Place, end: str, text: str, stats: Stats | None) -> None:
        self.engine.release(job)
        place.give_back()
        self._metrics.answer(end, job.queued_seconds, stats)
        if stats is not None:
            self._costs.learn(stats)
        if self._settings.log_content:
            log.info("answer (%s): %s", end, json.dumps(text))

    # what else is told

    async def _cost(self, request: Request) -> Response:
        return JSONResponse(self._costs.of_size(await read_json(request, self._settings.limits)))

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(openapi_document(self._settings, self._model.manifest.model.images))

    async def _health(self, _: Request) -> Response:
        healthy = self.engine.alive
        return JSONResponse({"status": "ok" if healthy else "stopped"}, 200 if healthy else 503)

    async def _tell_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_document(n) for n in self._settings.names]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._settings.names:
            raise ApiError(404, f"there is no model {name[:200]!r} here", "model", "model_not_found")
        return JSONResponse(self._model_document(name))

    def _model_document(self, name: str) -> dict[str, Any]:
        images = self._model.manifest.model.images
        limits = self._settings.limits
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "phisight",
            "context_length": self._model.context,
            "min_patches": None if images is None else images.min_patches,
            "max_patches": None if images is None else images.max_patches,
            "max_images": 0 if images is None else limits.images,
            "max_pixels": limits.pixels,
            "grounding_prompt": None if images is None or not is_installed() else PROMPT,
        }

    def _measure(self) -> None:
        gauge = self._metrics.gauge
        gauge("requests_held", "Requests that are being read, wait or are answered", lambda: self.places.taken)
        gauge("queue_waiting", "Requests that wait for the engine", lambda: self.engine.waiting)
        gauge("running", "Answers in work", lambda: self.engine.running)
        gauge("kv_cache_positions", "Positions in the KV cache, all slots", lambda: self._model.cached_positions)
        gauge("feature_cache_bytes", "Memory of the image features kept", lambda: self._model.feature_bytes)


class _Logged:
    """Counts and logs each request: method, path, status, seconds. Nothing of what it says."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # a client that left before the answer began

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.request(path, status)
            log.info("%s %s %d %.2f s", scope["method"], path, status, time.perf_counter() - started)


async def _on_error(_: Request, error: Exception) -> Response:
    return error_response(api_error(error))


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    said = "there is nothing" if error.status_code == 404 else str(error.detail)
    told = ApiError(
        error.status_code, f"{said} at {request.method} {request.url.path[:200]}", headers=error.headers or {}
    )
    return error_response(told)


async def _on_disconnect(_: Request, error: Exception) -> Response:
    return Response(status_code=499)
