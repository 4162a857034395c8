"""The application on a socket, with uvicorn."""

from __future__ import annotations

import asyncio
import errno
import socket

import uvicorn

from phisight.errors import EngineError, InputError
from phisight.model import Model
from phisight.serve.app import Service
from phisight.serve.settings import ServeSettings

__all__ = ["Server", "listen"]

# Connections beyond the requests that have a place: they wait for their turn to ask, or ask for health and metrics.
_SPARE_CONNECTIONS = 256
_CLOSING_SECONDS = 5


class Server(uvicorn.Server):
    """Serves one model until it is told to stop; `run(sockets=[listen(...)])`.

    When told to, it takes no more requests and lets those that run or wait end within the grace; what is left then ends
    with an error that says so.
    """

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        self.service = Service(model, settings)
        self._grace = settings.limits.grace_seconds
        config = uvicorn.Config(
            self.service.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody could claim any address
            ws="none",
            limit_concurrency=settings.limits.queue + _SPARE_CONNECTIONS,
            timeout_graceful_shutdown=int(self._grace) + _CLOSING_SECONDS,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._grace, self.service.engine.cancel_all, "the server is stopping: ask again later")
        await super().shutdown(sockets)
        timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises InputError, EngineError."""
    if not 0 <= port <= 65535:  # glibc would take the last 16 bits
        raise InputError(f"the port is {port}, wanted 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except socket.gaierror as error:
        raise InputError(f"the host {host!r} is no address of this machine: {error.strerror or error}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken: give another one with --port") from None
        raise EngineError(f"cannot listen on port {port} of {host}: {error.strerror or error}") from None
