"""A contender in a process of its own: it opens its files, then runs a stage whenever it is asked."""

from __future__ import annotations

from multiprocessing.connection import Connection
from time import perf_counter

from phisight.bench.contender import Contender, Figures
from phisight.bench.stages import Stage
from phisight.child_process import ChildProcess
from phisight.compare.memory import peak_memory

__all__ = ["ContenderProcess"]


class ContenderProcess(ChildProcess):
    """Started when made; ended when the context is left."""

    def __init__(self, contender: Contender) -> None:
        super().__init__(contender.name, _serve, contender)
        self.contender = contender
        self.load_seconds = 0.0

    def __enter__(self) -> ContenderProcess:
        return self

    def opened(self) -> float:
        """Wait until the files are open; the seconds that took. Raises what opening raised, EngineError."""
        self.load_seconds = float(self.receive())
        return self.load_seconds

    def seconds(self, stage: Stage) -> float:
        """Run a stage once. Raises what the engine raised, EngineError if the process ended."""
        self.send(stage)
        return float(self.receive())

    def figures(self) -> Figures:
        """What it measured of itself. Raises EngineError if the process ended."""
        self.send(None)
        return Figures(self.load_seconds, self.receive())


def _serve(pipe: Connection, contender: Contender) -> None:
    started = perf_counter()
    opened = contender.open()
    pipe.send(perf_counter() - started)
    while True:
        stage = pipe.recv()
        pipe.send(peak_memory() if stage is None else opened.seconds(stage))
