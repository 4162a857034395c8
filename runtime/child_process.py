"""A function in a process of its own, which answers over a pipe: nothing of ours is in its memory or its times."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from phisight.errors import EngineError, PhisightError

__all__ = ["ChildProcess"]


class ChildProcess:
    """Runs `target(pipe, *arguments)`, which a spawned process can import. Ended when the context is left.

    `name` is what its errors call it.
    """

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, target, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, value: Any) -> None:
        """Raises what the process raised, EngineError if it ended."""
        try:
            self._pipe.send(value)
        except OSError:
            self.receive()

    def receive(self) -> Any:
        """What it sent next. Raises what it raised (PhisightError), EngineError if it ended."""
        try:
            said = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise EngineError(f"the process of {self._name} ended with status {self._process.exitcode}") from None
        if isinstance(said, PhisightError):
            raise said
        return said

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _run(pipe: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends this process
    try:
        target(pipe, *arguments)
    except PhisightError as error:
        pipe.send(error)
    except EOFError:  # the parent is gone
        return
