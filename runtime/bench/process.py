"""A contender in a process of its own: it opens its files, then runs a stage whenever it is asked."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from time import perf_counter
from types import TracebackType
from typing import Any

from phisight.bench.contender import Contender, Figures
from phisight.bench.stages import Stage
from phisight.compare.memory import peak_memory
from phisight.errors import EngineError, PhisightError

__all__ = ["ContenderProcess"]


class ContenderProcess:
    """Started when made; ended when the context is left."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender), daemon=True)
        self._process.start()
        theirs.close()
        self.load_seconds = 0.0

    def opened(self) -> float:
        """Wait until the files are open; the seconds that took. Raises what opening raised, EngineError."""
        self.load_seconds = float(self._receive())
        return self.load_seconds

    def seconds(self, stage: Stage) -> float:
        """Run a stage once. Raises what the engine raised, EngineError if the process ended."""
        try:
            self._pipe.send(stage)
        except OSError:
            self._receive()
        return float(self._receive())

    def figures(self) -> Figures:
        """What it measured of itself. Raises EngineError if the process ended."""
        self._pipe.send(None)
        peak = self._receive()
        return Figures(self.load_seconds, peak)

    def _receive(self) -> Any:
        try:
            said = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            name, status = self.contender.name, self._process.exitcode
            raise EngineError(f"the process of {name} ended with status {status}") from None
        if isinstance(said, PhisightError):
            raise said
        return said

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, contender: Contender) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends this process
    try:
        started = perf_counter()
        opened = contender.open()
        pipe.send(perf_counter() - started)
        while True:
            stage = pipe.recv()
            pipe.send(peak_memory() if stage is None else opened.seconds(stage))
    except PhisightError as error:
        pipe.send(error)
    except EOFError:  # the parent is gone
        return
