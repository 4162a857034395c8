"""Who waits, and whose turn it is.

Places bound how many requests are held at all, from their headers on; the queue orders those that are ready to be
answered: one of each client in turn, so that a flood of one delays nobody else by more than one answer.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from typing import Generic, TypeVar

from phisight.serve.errors import ApiError
from phisight.serve.settings import Limits

__all__ = ["FairQueue", "Place", "Places"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served within a client; client after client in turn. For several threads."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, deque[T]] = OrderedDict()  # the next client first
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, client: bytes, item: T) -> None:
        """Add an item of a client."""
        with self._changed:
            self._waiting.setdefault(client, deque()).append(item)
            self._changed.notify()

    def take(self) -> T | None:
        """The next item, waited for; None once the queue is closed and empty."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            client, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if items:
                self._waiting[client] = items  # at the end: the others come first
            return item

    def drop(self, client: bytes, item: T) -> bool:
        """Take an item out of turn; False if it is not there any more."""
        with self._changed:
            items = self._waiting.get(client, deque())
            if item not in items:
                return False
            items.remove(item)
            if not items:
                del self._waiting[client]
            return True

    def close(self) -> None:
        """Let `take` end once everything is taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Places:
    """How many requests may be held: one that is answered and those that wait. For the event loop's thread alone.

    Some places are kept for clients who have none, so that one client cannot keep all others out.
    """

    def __init__(self, limits: Limits) -> None:
        self._most = limits.queue + 1
        self._reserved = limits.reserved_places
        self._taken: Counter[bytes] = Counter()

    @property
    def taken(self) -> int:
        """Requests that are held now."""
        return self._taken.total()

    def take(self, client: bytes, retry_after: int) -> Place:
        """A place for a request of this client. Raises ApiError with status 429 when there is none."""
        most = self._most - (self._reserved if self._taken[client] else 0)
        if self.taken >= most:
            raise ApiError(
                429,
                f"{self.taken} requests are waiting or being answered, no more are taken now: try again later",
                code="queue_full",
                headers={"Retry-After": str(retry_after)},
            )
        self._taken[client] += 1
        return Place(self, client)

    def _give_back(self, client: bytes) -> None:
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]


class Place:
    """One request's place; given back once."""

    def __init__(self, places: Places, client: bytes) -> None:
        self._places: Places | None = places
        self._client = client

    def give_back(self) -> None:
        """Free the place. A second time does nothing."""
        if self._places is not None:
            self._places._give_back(self._client)
            self._places = None
