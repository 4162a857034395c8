"""A training run in a directory: its state, saved as it goes, and the processes that work on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from phisight.errors import InputError, PhisightError
from phisight.training.optimizer import Buffers, Slot, slots
from phisight.training.recipe import Stage

__all__ = ["STATE", "TOKENIZER", "Run"]

STATE, TOKENIZER = "state.pt", "tokenizer.json"
SAVED = ("weights", "momentum", "second")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one thread for each process: faster than one process with as many threads
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",  # memory is kept, not given back after every step
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Run:
    """Weights and moments in shared memory, and where the run stands.

    position: (2,) int64, the stage and the step in it that comes next. The moments start anew with a stage.
    """

    directory: Path
    seed: int
    slots: tuple[Slot, ...]
    buffers: Buffers
    position: Tensor

    @classmethod
    def start(cls, directory: Path, seed: int, weights: dict[str, Tensor], tokenizer: str, processes: int) -> Run:
        """A new run from these weights. Raises InputError if the directory holds one."""
        if (directory / STATE).exists():
            raise InputError(f"{directory} holds a training run already: continue it, or choose another directory")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER).write_text(tokenizer, encoding="utf-8", newline="\n")
        run = cls._empty(directory, seed, {name: tuple(tensor.shape) for name, tensor in weights.items()}, processes)
        for name, tensor in run.weights().items():
            tensor.copy_(weights[name])
        run.save()
        return run

    @classmethod
    def resume(cls, directory: Path, processes: int) -> Run:
        """The run as it was saved last."""
        state = torch.load(directory / STATE, weights_only=True)
        run = cls._empty(directory, state["seed"], state["shapes"], processes)
        run.position.copy_(state["position"])
        for name in SAVED:
            getattr(run.buffers, name).copy_(state[name])
        return run

    @classmethod
    def _empty(cls, directory: Path, seed: int, shapes: dict[str, tuple[int, ...]], processes: int) -> Run:
        placed = slots(shapes, processes)
        position = torch.zeros(2, dtype=torch.int64).share_memory_()
        return cls(directory, seed, placed, Buffers.zeros(placed[-1].end, processes), position)

    def save(self) -> None:
        """Replace the state on disk once the new one is complete."""
        state = {"seed": self.seed, "position": self.position.clone()}
        state["shapes"] = {slot.name: slot.shape for slot in self.slots}
        state |= {name: getattr(self.buffers, name).clone() for name in SAVED}
        part = self.directory / f"{STATE}.part"
        torch.save(state, part)
        part.replace(self.directory / STATE)

    def weights(self) -> dict[str, Tensor]:
        return {slot.name: slot.of(self.buffers.weights) for slot in self.slots}

    def train(self, recipe: Sequence[Stage], stop_at: float | None = None) -> bool:
        """Go on to the end of the recipe, or until time.time() reaches `stop_at`. Whether the end was reached.

        An interrupt lets the processes finish their step; the state is saved, then KeyboardInterrupt raised.
        """
        from phisight.training.worker import work

        processes = len(self.buffers.gradients)
        context = multiprocessing.get_context("spawn")
        asked, barrier = context.Event(), context.Barrier(processes)
        arguments = (self, tuple(recipe), barrier, asked, torch.zeros(1, dtype=torch.bool).share_memory_(), stop_at)
        workers = [context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(processes)]
        interrupted = False
        try:
            with _environment():
                for worker in workers:
                    worker.start()
            _wait(workers)
        except KeyboardInterrupt:
            interrupted = True
            asked.set()
            _wait(workers)
        self.save()
        if interrupted:
            raise KeyboardInterrupt
        return int(self.position[0]) == len(recipe)


def _wait(workers: Sequence[Any]) -> None:
    """Until all have ended. Raises PhisightError if one failed, after ending the others, who would wait for it."""
    while any(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.join(0.5)
        if any(worker.exitcode for worker in workers):
            for worker in workers:
                worker.terminate()
            raise PhisightError("a training process failed: what it said is above")


@contextmanager
def _environment() -> Iterator[None]:
    """Settings that processes read when they start."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
