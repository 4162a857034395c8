"""Pictures fetched from hosts that the owner has allowed: bounded in size, time and redirects, never from this network.

The name is resolved once and the connection goes to the very address that was checked, so that a name cannot be
pointed to another address in between.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from phisight.errors import ImageError
from phisight.serve.settings import Limits

__all__ = ["RemotePictures", "is_public"]

_PIECE = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class RemotePictures:
    """Fetches from `hosts` alone: names, or name:port for another port than the scheme's. `public` checks addresses."""

    hosts: tuple[str, ...]
    limits: Limits
    public: Callable[[str], bool] = lambda address: is_public(address)

    def fetch(self, url: str) -> bytes:
        """The bytes at a URL. Raises ImageError."""
        deadline = monotonic() + self.limits.remote_seconds
        for _ in range(self.limits.remote_redirects + 1):
            parts = self._checked(url)
            try:
                found = self._get(parts, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ImageError(
                    f"the picture at {parts.hostname} cannot be fetched: {error or type(error).__name__}"
                ) from None
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise ImageError(f"the picture is behind more than {self.limits.remote_redirects} redirects: give the last")

    def _checked(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ImageError("the picture's URL is malformed") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ImageError("the picture's URL must be http or https, with a host and without a password")
        if any(c <= " " or c > "~" for c in url):
            raise ImageError("the picture's URL holds a space, or a character that must be written as %XX")
        standard = port is None or port == (443 if parts.scheme == "https" else 80)
        name = parts.hostname if standard else f"{parts.hostname}:{port}"
        if name not in {host.lower() for host in self.hosts}:
            raise ImageError(f"pictures are not fetched from {name}: send a data URL, or allow it with --image-host")
        return parts

    def _get(self, parts: SplitResult, deadline: float) -> bytes | str:
        """The bytes, or where a redirect leads."""
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        private = [address for address in addresses if not self.public(address)]
        if private or not addresses:
            raise ImageError(f"pictures are not fetched from {host}: {private[0]} is no public address")
        connection = _Connection(host, port, addresses[0], _left(deadline), secure=parts.scheme == "https")
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return response.headers.get("location", "")
            if response.status != 200:
                raise ImageError(f"the picture at {host} cannot be fetched: status {response.status}")
            return self._read(response, connection, host, deadline)
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, connection: _Connection, host: str, deadline: float) -> bytes:
        body = bytearray()
        while True:
            if connection.sock is not None:  # it is None once a server has said that it closes
                connection.sock.settimeout(_left(deadline))
            piece = response.read1(_PIECE)
            _left(deadline)
            if not piece:
                return bytes(body)
            body += piece
            if len(body) > self.limits.remote_bytes:
                raise ImageError(f"the picture at {host} is larger than {self.limits.remote_bytes} bytes: shrink it")


class _Connection(http.client.HTTPConnection):
    """To a given address; the name is only told, and checked against the certificate."""

    def __init__(self, host: str, port: int, address: str, seconds: float, *, secure: bool) -> None:
        super().__init__(host, port, timeout=seconds)
        self._address = address
        self._secure = secure

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock: Any = plain
        if self._secure:
            try:
                self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
            except BaseException:
                plain.close()
                raise


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also behind the ways in which IPv6 wraps IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _left(deadline: float) -> float:
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError("it takes too long")
    return left
