"""Errors as OpenAI's clients read them: a status, and a document that says what was wrong and where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from phisight.errors import ImageError, InputError, PhisightError, PromptError

__all__ = ["ApiError", "api_error", "error_response", "refused"]

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""`type` by status; all others are "invalid_request_error"."""


@dataclass
class ApiError(Exception):
    """What a request gets instead of an answer.

    param: the parameter that is wrong, such as "messages[0].content[1].image_url". code: for programs.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def as_json(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A parameter that cannot be honoured: status 400."""
    return ApiError(400, message, param, code)


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """Any exception as what the client is told. Of one that was not raised on purpose only the class is told."""
    match error:
        case ApiError():
            return error
        case ImageError():
            return ApiError(400, str(error), param, "invalid_image")
        case PromptError():
            code = "context_length_exceeded" if "the context holds" in str(error) else "invalid_prompt"
            return ApiError(400, str(error), param or "messages", code)
        case InputError():
            return ApiError(400, str(error), param, "invalid_value")
        case PhisightError():
            return ApiError(500, str(error), param, "engine_error")
        case MemoryError():
            return ApiError(503, "the server has not enough memory for this request", param, "out_of_memory")
        case _:
            return ApiError(500, f"unexpected {type(error).__name__}: see the server's log", param, "internal_error")


def error_response(error: ApiError) -> Response:
    """As JSON; ASCII alone, since a message may quote half a surrogate pair."""
    return Response(
        json.dumps(error.as_json()), error.status, headers=dict(error.headers), media_type="application/json"
    )
