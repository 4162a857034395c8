"""A request's body as JSON, bounded in size and time before anything is made of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from phisight.serve.errors import ApiError
from phisight.serve.settings import Limits

__all__ = ["read_json"]

# What is still read, and thrown away, of a body that is too large: a client that is sending does not read answers.
_DRAINED = 4
_DRAIN_SECONDS = 5.0

# Each may become an object of some 100 bytes of memory where it took two bytes of the body.
_MOST_BRACKETS = 500_000


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The object that the body holds.

    Raises ApiError: 415 for another type, 413 when it is too large, 408 when it comes too slowly, 400 when it is no
    JSON object; and starlette's ClientDisconnect.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:80]!r}, wanted application/json", code="wrong_type")
    return _parse(await _read(request, limits))


async def _read(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "0")
    too_large = declared.isascii() and declared.isdecimal() and int(declared[:20]) > limits.body_bytes
    body = bytearray()
    try:
        async with asyncio.timeout(_DRAIN_SECONDS if too_large else limits.body_seconds):
            drained = 0
            async for piece in request.stream():
                if too_large or len(body) + len(piece) > limits.body_bytes:
                    too_large = True
                    body.clear()
                    drained += len(piece)
                    if drained > _DRAINED * limits.body_bytes:
                        break
                else:
                    body += piece
    except TimeoutError:
        if not too_large:
            raise ApiError(
                408,
                f"the body did not arrive within {limits.body_seconds:g} seconds",
                code="slow_body",
                headers={"Connection": "close"},
            ) from None
    if too_large:
        raise ApiError(
            413,
            f"the body is larger than {limits.body_bytes} bytes: send smaller pictures, or start the server with "
            "--max-body",
            code="body_too_large",
            headers={"Connection": "close"},
        )
    return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    if body.count(b"{") + body.count(b"[") > _MOST_BRACKETS:
        raise ApiError(400, f"the body has over {_MOST_BRACKETS} brackets: send less", code="invalid_json")
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} cannot be read", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        found = type(document).__name__
        raise ApiError(400, f"the body is a JSON {found}, wanted an object", code="invalid_json")
    return document


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
