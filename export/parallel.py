"""Reading, quantising and writing at the same time, and naming the tensor that something is wrong with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from phisight.errors import CheckpointError

__all__ = ["Progress", "in_parallel", "naming"]

Progress = Callable[[int], None]
"""Called with the number of weights done since the last call."""

T = TypeVar("T")
R = TypeVar("R")
WORKERS = 2
"""Threads that quantise while one writes: NumPy and ggml release the interpreter. More would hold more slices."""


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` on a few threads, in order, with no more than a few items in memory."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def naming(tensor: str) -> Iterator[None]:
    """What is wrong with weights is said with the tensor's name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{tensor}: {error}") from error
