"""One clock for all that is timed here."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

__all__ = ["seconds_of"]


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    started = perf_counter()
    work()
    return perf_counter() - started
