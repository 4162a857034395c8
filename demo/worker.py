"""One process of a training run: draw, forward, backward; then all update their share of the weights."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
from torch import Tensor

from phisight.export.names import VISION
from phisight.training.architecture import LABEL_HEAD, MODEL
from phisight.training.batches import draw_batch, training_rng
from phisight.training.dialogue import Dialogue, make_rows
from phisight.training.forward import Weights, encode
from phisight.training.losses import Scores, answer_loss, label_loss
from phisight.training.optimizer import update
from phisight.training.recipe import Stage, rate_at
from phisight.training.run import TOKENIZER, Run
from phisight.training.vocabulary import Vocabulary

__all__ = ["work"]

LOG = "log.jsonl"
LOG_EVERY = 50
"""Steps between two lines of the log."""
SAVE_EVERY = 300.0
"""Seconds between two saves."""


def work(
    rank: int, run: Run, recipe: tuple[Stage, ...], barrier: Any, asked: Any, stop: Tensor, stop_at: float | None
) -> None:
    """Train until the recipe ends, `asked` is set, or time.time() reaches `stop_at`. Only rank 0 writes and decides.

    Between two barriers the weights change; what rank 0 does after them, others see only before the next.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and asks
    torch.set_num_threads(1)
    dialogue = Dialogue(Vocabulary(tokenizers.Tokenizer.from_file(str(run.directory / TOKENIZER))))
    gradients = run.buffers.gradients[rank]
    weights = {}
    for slot in run.slots:
        weights[slot.name] = slot.of(run.buffers.weights).detach().requires_grad_()
        weights[slot.name].grad = slot.of(gradients)
    first_stage, first_step = run.position.tolist()
    saved = time.monotonic()
    for number, stage in enumerate(recipe[first_stage:], first_stage):
        mine = [slot for slot in run.slots if slot.owner == rank and (stage.answers or _of_tower(slot.name))]
        scores, began = Scores(), time.monotonic()
        first = first_step if number == first_stage else 0
        for step in range(first, stage.steps):
            gradients.zero_()
            _loss(weights, dialogue, stage, training_rng(run.seed, stage.name, step, rank), scores).backward()
            barrier.wait()
            rate = rate_at(stage, step)
            shares = [(slot, rate * (stage.tower_rate if _of_tower(slot.name) else 1.0)) for slot in mine]
            update(run.buffers, shares, step + 1)
            if rank == 0:
                run.position[1] = step + 1
                stop[0] = asked.is_set() or (stop_at is not None and time.time() >= stop_at)
            barrier.wait()
            if rank == 0 and ((step + 1) % LOG_EVERY == 0 or step + 1 == stage.steps):
                pace = (time.monotonic() - began) / (step + 1 - first)
                _log(run.directory, stage, step + 1, rate, pace, scores.take())
            if stop[0]:
                return
            if rank == 0 and time.monotonic() - saved > SAVE_EVERY:
                run.save()
                saved = time.monotonic()
        barrier.wait()
        if rank == 0:
            run.position.copy_(torch.tensor([number + 1, 0]))
            run.buffers.momentum.zero_()
            run.buffers.second.zero_()
        barrier.wait()


def _of_tower(name: str) -> bool:
    return name.startswith(VISION) or name in LABEL_HEAD


def _loss(weights: Weights, dialogue: Dialogue, stage: Stage, rng: Random, scores: Scores) -> Tensor:
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
