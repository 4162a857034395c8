"""What the server allows: who may come, and how much one request may ask."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from phisight.errors import InputError

__all__ = ["Access", "Limits", "ServeSettings", "is_loopback"]


@dataclass(frozen=True)
class Limits:
    """How much is taken on. All are checked before the work that they bound. Raises InputError.

    queue: answers that may wait besides the one that runs.
    body_bytes, body_seconds: size of a request's body, and how long it may take to arrive.
    images, pixels, messages, characters: of one request; pixels of each image, characters of all texts.
    max_tokens: most tokens of one answer; None: up to the context's end.
    answer_seconds: from a request's arrival to its answer's end, waiting included.
    grace_seconds: for answers that run when the server is told to stop.
    remote_bytes, remote_seconds, remote_redirects: of one image fetched from an allowed host.
    """

    queue: int = 16
    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    images: int = 8
    pixels: int = 50_000_000
    messages: int = 1000
    characters: int = 1_000_000
    max_tokens: int | None = None
    answer_seconds: float = 3600.0
    grace_seconds: float = 30.0
    remote_bytes: int = 20 << 20
    remote_seconds: float = 10.0
    remote_redirects: int = 3

    def __post_init__(self) -> None:
        may_be_zero = ("queue", "images", "grace_seconds", "remote_redirects")
        for name, value in vars(self).items():
            least = 0 if name in may_be_zero else 1 if isinstance(value, int) else 1e-3
            if value is not None and not least <= value < float("inf"):
                raise InputError(f"{name} is {value}, wanted {least} or more")

    @property
    def reserved_places(self) -> int:
        """Places of the queue that are kept for clients who have nothing in it."""
        return self.queue // 4


@dataclass(frozen=True)
class Access:
    """Who may come. Raises InputError for an address other than loopback without a key, unless `without_key`.

    host: the address to listen on.
    api_keys: any of these is accepted; none: whatever key a client sends, or none.
    allowed_hosts: names besides the server's own that the Host header may have.
    allowed_origins: origins of pages whose scripts may ask, such as https://app.example; "*" is every one.
    image_hosts: hosts from which pictures are fetched.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    without_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError("an API key is empty or holds a space or a character outside ASCII: give another")
        for origin in self.allowed_origins:
            parts = urlsplit(origin)
            if origin != "*" and (
                parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise InputError(f"the origin is {origin!r}, wanted one like https://app.example, or *")
        for name in (*self.allowed_hosts, *self.image_hosts):
            if not name or set(name) & set("/@?#* "):
                raise InputError(f"the host is {name!r}, wanted a name like pictures.example, without scheme and path")
        if not self.api_keys and not self.without_key and not is_loopback(self.host):
            raise InputError(
                f"the server would answer everybody who reaches {self.host}: give --api-key or --api-key-file, "
                "or --without-key if that is meant"
            )


@dataclass(frozen=True)
class ServeSettings:
    """All of it. names: what clients may call the model, the first one is told. slots: conversations kept in the cache.

    log_content: print the messages' texts and the answers. Raises InputError.
    """

    names: tuple[str, ...]
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    slots: int = 2
    log_content: bool = False

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise InputError("the model has no name: give one with --name")
        if self.slots < 1:
            raise InputError(f"slots is {self.slots}, wanted 1 or more")


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone. Of names only localhost is taken to."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
