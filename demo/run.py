"""A training run in a directory: its state, saved as it goes, and the processes that work on it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from phisight.errors import InputError
from phisight.export.names import VISION
from phisight.training.architecture import LABEL_HEAD, MODEL
from phisight.training.batches import draw_batch, training_rng
from phisight.training.dialogue import Dialogue, make_rows
from phisight.training.forward import encode
from phisight.training.losses import Scores, answer_loss, label_loss
from phisight.training.optimizer import Buffers, Slot, slots, update
from phisight.training.recipe import Stage, rate_at
from phisight.training.vocabulary import Vocabulary

__all__ = ["Progress", "Run"]

STATE, LOG, TOKENIZER = "state.pt", "log.jsonl", "tokenizer.json"
SAVE_EVERY = 300.0
"""Seconds between two saves."""
LOG_EVERY = 50
"""Steps between two lines of the log."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one thread for each process: faster than one process with as many threads
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",  # memory is kept, not given back after every step
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps of the stage, and of the moments, which start anew with a stage."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """Weights and moments in shared memory, and where the run stands."""

    directory: Path
    seed: int
    slots: list[Slot]
    buffers: Buffers
    progress: Progress

    @classmethod
    def start(cls, directory: Path, seed: int, weights: dict[str, Tensor], tokenizer: str, processes: int) -> Run:
        """A new run from these weights. Raises InputError if the directory holds one."""
        if (directory / STATE).exists():
            raise InputError(f"{directory} holds a training run already: continue it, or choose another directory")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER).write_text(tokenizer, encoding="utf-8", newline="\n")
        placed = slots(weights, processes)
        buffers = Buffers.zeros(placed[-1].end, processes)
        for slot in placed:
            slot.of(buffers.weights).copy_(weights[slot.name])
        run = cls(directory, seed, placed, buffers, Progress())
        run.save()
        return run

    @classmethod
    def resume(cls, directory: Path, processes: int) -> Run:
        state = torch.load(directory / STATE, weights_only=True)
        placed = slots({name: torch.empty(shape, device="meta") for name, shape in state["shapes"].items()}, processes)
        buffers = Buffers.zeros(placed[-1].end, processes)
        for name in ("weights", "momentum", "second"):
            getattr(buffers, name).copy_(state[name])
        return cls(directory, state["seed"], placed, buffers, Progress(**state["progress"]))

    def save(self) -> None:
        state = {
            "seed": self.seed,
            "shapes": {slot.name: slot.shape for slot in self.slots},
            "progress": asdict(self.progress),
            **{name: getattr(self.buffers, name).clone() for name in ("weights", "momentum", "second")},
        }
        torch.save(state, self.directory / f"{STATE}.part")
        (self.directory / f"{STATE}.part").replace(self.directory / STATE)

    def weights(self) -> dict[str, Tensor]:
        return {slot.name: slot.of(self.buffers.weights) for slot in self.slots}

    def train(self, recipe: Sequence[Stage], stop_at: float | None = None) -> bool:
        """Go on to the end of the recipe, or until time.time() reaches `stop_at`. Whether the end was reached.

        After an interrupt the state is saved, up to the last whole step.
        """
        processes = len(self.buffers.gradients)
        context = multiprocessing.get_context("spawn")
        with _environment():
            while self.progress.stage < len(recipe):
                stage = recipe[self.progress.stage]
                step, stop = context.Value("l", self.progress.step), context.Value("b", 0)
                barrier = context.Barrier(processes)
                arguments = (self, stage, barrier, step, stop, stop_at)
                workers = [
                    context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(processes)
                ]
                for worker in workers:
                    worker.start()
                self._watch(workers, stage, step, stop)
                if self.progress.step < stage.steps:
                    return False
                self.progress = Progress(self.progress.stage + 1, 0, self.progress.seconds)
                self.buffers.momentum.zero_()
                self.buffers.second.zero_()
                self.save()
        return True

    def _watch(self, workers: Sequence[Any], stage: Stage, step: Any, stop: Any) -> None:
        """Save now and then until the workers end. An interrupt lets them finish their step first."""
        began, before = time.monotonic(), self.progress.seconds
        interrupted = False
        while any(worker.is_alive() for worker in workers):
            try:
                for worker in workers:
                    worker.join(SAVE_EVERY / len(workers))
            except KeyboardInterrupt:
                interrupted = True
                stop.value = 1
            if any(worker.exitcode for worker in workers):
                for worker in workers:
                    worker.terminate()
                raise RuntimeError("a training process failed: its message is above")
            self.progress = replace(self.progress, step=int(step.value), seconds=before + time.monotonic() - began)
            self.save()
        if interrupted:
            raise KeyboardInterrupt


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


def _work(rank: int, run: Run, stage: Stage, barrier: Any, step: Any, stop: Any, stop_at: float | None) -> None:
    """One process: draw, forward, backward; then all update their share of the weights."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run between two steps
    torch.set_num_threads(1)
    dialogue = Dialogue(Vocabulary(tokenizers.Tokenizer.from_file(str(run.directory / TOKENIZER))))
    gradients = run.buffers.gradients[rank]
    weights = {}
    for slot in run.slots:
        weights[slot.name] = slot.of(run.buffers.weights).detach().requires_grad_()
        weights[slot.name].grad = slot.of(gradients)
    mine = [slot for slot in run.slots if slot.owner == rank and (stage.answers or _of_tower(slot.name))]
    scores, began, first = Scores(), time.monotonic(), int(step.value)
    for index in range(first, stage.steps):
        gradients.zero_()
        rng = training_rng(run.seed, stage.name, index, rank)
        loss = _loss(weights, dialogue, stage, rng, scores)
        loss.backward()
        barrier.wait()
        rate = rate_at(stage, index)
        shares = [(slot, rate * (stage.tower_rate if _of_tower(slot.name) else 1.0)) for slot in mine]
        update(run.buffers, shares, index + 1)
        if rank == 0:
            step.value = index + 1
            if stop_at is not None and time.time() > stop_at:
                stop.value = 1
            done = index + 1
            if done % LOG_EVERY == 0 or done == stage.steps:
                pace = (time.monotonic() - began) / (done - first)
                _log(run.directory, stage, done, rate, pace, scores.take())
        barrier.wait()
        if stop.value:
            break


def _of_tower(name: str) -> bool:
    return name.startswith(VISION) or name in LABEL_HEAD


def _loss(weights: dict[str, Tensor], dialogue: Dialogue, stage: Stage, rng: Any, scores: Scores) -> Tensor:
    assert MODEL.vision is not None
    text_length = stage.text_length if stage.answers else 0
    batch = draw_batch(rng, stage.mix, stage.tokens, text_length)
    features = encode(weights, MODEL.vision, batch.patches, batch.grid)
    loss = label_loss(weights, features, batch, scores)
    scores.add("loss labels", loss.item())
    loss = loss * stage.label_weight
    if stage.answers:
        prefix = len(dialogue.opening) + batch.per_row * (features.shape[1] + len(dialogue.after_picture))
        rows = make_rows(dialogue, batch.questions, prefix=prefix, length=text_length, rng=rng)
        answers = answer_loss(weights, dialogue, rows, features, batch.per_row, scores)
        scores.add("loss answers", answers.item())
        loss = loss + answers
    return loss


def _log(directory: Path, stage: Stage, step: int, rate: float, pace: float, scores: dict[str, float]) -> None:
    left = (stage.steps - step) * pace
    line = {"stage": stage.name, "step": step, "of": stage.steps, "rate": round(rate, 5)}
    line |= {"seconds_a_step": round(pace, 3), "minutes_left": round(left / 60, 1), **scores}
    with (directory / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
