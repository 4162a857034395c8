"""Who may come in: the Host header, the Origin header, the key, in this order, before any other code sees a request.

A page of a foreign site can make a browser send requests to 127.0.0.1, under its own name (Origin tells) or under a
name that it has pointed here (DNS rebinding: Host tells). An address as Host is no rebinding: it cannot be pointed
elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phisight.serve.errors import ApiError, error_response
from phisight.serve.settings import Access, is_loopback

__all__ = ["Guard", "client_of"]

OPEN_PATHS = ("/health", "/")
OPEN_FOLDER = "/page/"
"""These need no key: a load balancer has none, and neither has a browser before the page asks for it."""

CORS = {
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "600",
    "Access-Control-Expose-Headers": "Retry-After",
}


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._digests = [_digest(key) for key in access.api_keys]
        self._names = {"localhost", *(name.lower() for name in access.allowed_hosts)}
        if not is_loopback(access.host):
            self._names |= {access.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        shared = ""
        try:
            self._check_host(headers)
            shared = self._shared_with(headers)
            if scope["method"] == "OPTIONS" and shared:  # a browser asks before it sends a key
                response = Response(status_code=204, headers=CORS)
            else:
                self._check_key(scope["path"], headers)
                await self._app(scope, receive, _sharing(send, shared))
                return
        except ApiError as error:
            response = error_response(error)
        await response(scope, receive, _sharing(send, shared))

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else ""
        if not name or not (name in self._names or self._is_own_address(name)):
            raise ApiError(
                403,
                f"the Host header is {', '.join(hosts)[:200]!r}, which is no name of this server: "
                "use its address, or start it with --allow-host NAME",
                code="foreign_host",
            )

    def _is_own_address(self, name: str) -> bool:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return is_loopback(name) or not is_loopback(self._access.host)

    def _shared_with(self, headers: Headers) -> str:
        """The foreign origin whose scripts may read the answer; "" if a page of our own or no page asks."""
        origin = headers.get("origin")
        if origin is None:
            return ""
        parts = urlsplit(origin)
        if parts.scheme in ("http", "https") and parts.netloc == headers["host"]:
            return ""
        if origin in self._access.allowed_origins or "*" in self._access.allowed_origins:
            return origin
        raise ApiError(
            403,
            f"pages of {origin[:200]!r} may not use this server: start it with --allow-origin ORIGIN to let them",
            code="foreign_origin",
        )

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._digests or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        given = _digest(_key(headers))
        # All are compared, each in constant time: the time tells nothing about a key.
        if not sum(hmac.compare_digest(given, digest) for digest in self._digests):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def client_of(scope: Scope) -> bytes:
    """Who asks, for the queue's fairness: the address, and a digest of the key that was sent."""
    address = scope["client"][0] if scope.get("client") else ""
    return address.encode() + _digest(_key(Headers(scope=scope)))


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    """The name or address in a Host header, "" if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises for a port that is no number
        plain = not (parts.path or parts.query or parts.fragment or "@" in host)
        return (parts.hostname or "").rstrip(".") if plain else ""
    except ValueError:
        return ""


def _sharing(send: Send, origin: str) -> Send:
    """Answers carry what every one of ours does, and for a foreign origin that may read them, its name."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Cross-Origin-Resource-Policy"] = "cross-origin" if origin else "same-origin"
            headers.setdefault("Cache-Control", "no-store")
            if origin:
                headers["Access-Control-Allow-Origin"] = origin
                headers.add_vary_header("Origin")
        await send(message)

    return sending
