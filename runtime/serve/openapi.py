"""The OpenAPI document: what the server's addresses take and answer, with the limits of this server."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from phisight.config import ImageBudget
from phisight.serve.chat_schema import chat_schemas
from phisight.serve.errors import TYPES
from phisight.serve.settings import ServeSettings

__all__ = ["openapi_document"]

JSON = "application/json"

MEANINGS = {
    400: "A parameter, a message or a picture cannot be honoured; `error.param` names it",
    401: "The key is missing or not one of the server's",
    403: "The Host or Origin header is not one of the server's",
    404: "There is no such model, or nothing at this address",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "The queue is full: ask again after the seconds of Retry-After",
    500: "The engine failed",
    503: "The server stops, or lacks memory",
    504: "The answer did not end in time",
}


def openapi_document(settings: ServeSettings, budget: ImageBudget | None) -> dict[str, Any]:
    """As JSON, OpenAPI 3.1. `budget` None: a model without pictures."""
    schemas = chat_schemas(settings, budget) | {
        "Error": _ERROR,
        "Model": _object(
            id=_enum(*settings.names),
            object=_enum("model"),
            context_length=_COUNT,
            min_patches=_COUNT_OR_NULL,
            max_patches=_COUNT_OR_NULL,
            grounding_prompt=_TEXT_OR_NULL,
        ),
        "ModelList": _object(object=_enum("list"), data={"type": "array", "items": _ref("Model")}),
        "ImageSize": _image_size(budget),
        "ImageCost": _IMAGE_COST,
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "phisight",
            "version": version("phisight"),
            "description": "OpenAI's chat API over one vision-language model on this machine.",
        },
        "paths": _paths(settings.names),
        "components": {"schemas": schemas},
    }
    if settings.access.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _paths(names: tuple[str, ...]) -> dict[str, Any]:
    chat = {
        "200": {
            "description": "The answer; with `stream` events, each `data:` and a ChatCompletionChunk, [DONE] last",
            "content": {
                JSON: {"schema": _ref("ChatCompletion")},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        }
    }
    taking = (400, 401, 403, 408, 413, 415)
    reading = (401, 403)
    name = {"name": "name", "in": "path", "required": True, "schema": _enum(*names)}
    return {
        "/v1/chat/completions": {
            "post": _takes("ChatRequest") | _operation("Answer a conversation", chat, *taking, 404, 429, 500, 503, 504)
        },
        "/v1/models": {"get": _operation("The model's names", _answers("ModelList"), *reading)},
        "/v1/models/{name}": {
            "get": _operation("The model by one of its names", _answers("Model"), *reading, 404)
            | {"parameters": [name]}
        },
        "/v1/images/cost": {
            "post": _takes("ImageSize") | _operation("What a picture will cost", _answers("ImageCost"), *taking)
        },
        "/health": {
            "get": _operation(
                "Whether a request would be answered",
                _answers({"type": "object"}) | {"503": {"description": "No"}},
                403,
            )
            | {"security": []}
        },
        "/metrics": {
            "get": _operation(
                "Counts and times, in Prometheus' format",
                {"200": {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}},
                *reading,
            )
        },
        "/openapi.json": {"get": _operation("This document", _answers({"type": "object"}), *reading)},
    }


def _operation(summary: str, responses: dict[str, Any], *refusals: int) -> dict[str, Any]:
    content = {JSON: {"schema": _ref("Error")}}
    refused = {str(status): {"description": MEANINGS[status], "content": content} for status in sorted(refusals)}
    return {"summary": summary, "responses": responses | refused}


def _takes(name: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {JSON: {"schema": _ref(name)}}}}


def _answers(schema: str | dict[str, Any]) -> dict[str, Any]:
    told = _ref(schema) if isinstance(schema, str) else schema
    return {"200": {"description": "OK", "content": {JSON: {"schema": told}}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _enum(*values: Any) -> dict[str, Any]:
    return {"enum": list(values)}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _image_size(budget: ImageBudget | None) -> dict[str, Any]:
    side = {"type": "integer", "minimum": 1, "maximum": 1_000_000, "description": "Pixels, the picture upright"}
    patches: dict[str, Any] = {"type": ["integer", "null"], "minimum": 1}
    if budget is not None:
        patches["maximum"] = budget.max_patches
    size = _object(width=side, height=side)
    size["properties"] |= {"max_patches": patches, "model": {"type": ["string", "null"]}}
    return size | {"additionalProperties": False}


_COUNT = {"type": "integer", "minimum": 0}
_COUNT_OR_NULL = {"type": ["integer", "null"], "minimum": 0}
_SECONDS = {"type": ["number", "null"], "minimum": 0}
_PAIR = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_TEXT_OR_NULL = {"type": ["string", "null"]}

_IMAGE_COST = _object(
    object=_enum("image.cost"),
    size=_PAIR,
    seen=_PAIR,
    grid=_PAIR,
    tokens=_COUNT,
    encode_seconds=_SECONDS,
    prefill_seconds=_SECONDS,
)

_ERROR = _object(
    error=_object(
        message={"type": "string"},
        type=_enum("invalid_request_error", *sorted(set(TYPES.values()))),
        param=_TEXT_OR_NULL,
        code=_TEXT_OR_NULL,
    )
)
