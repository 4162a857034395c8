"""What training minimises: the labels of patches, and the answers to questions."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from phisight.tasks.question import box_overlap, centre_inside, read_box
from phisight.training.architecture import COORDINATES, FIRST_COORDINATE, LABEL_HEAD, MODEL
from phisight.training.batches import Batch
from phisight.training.dialogue import Dialogue, Rows
from phisight.training.forward import Weights, decode, embed, logits, project
from phisight.training.labels import LABELS

__all__ = ["Scores", "answer_loss", "hidden_states", "label_loss"]

LABEL_WEIGHT = {"glyph_left": 2.0, "glyph_right": 2.0, "word": 1.0}
EMPTY_WEIGHT = 0.15
"""Of patches where there is nothing to be labelled, which are most."""
NEIGHBOURS = {-2: 0.06, -1: 0.2, 0: 0.48, 1: 0.2, 2: 0.06}
"""A coordinate's probability, spread over its neighbours."""
TASK_WEIGHT = {
    "count": 1.6,
    "chart": 1.3,
    "two_images": 1.3,
    "find": 0.5,
    "character": 0.5,
    "line": 0.5,
    "arithmetic": 0.3,
}
FEATURE_SIZE = 16.0
"""Most that the features' root mean square should be. Labels are read from normed features, and so would not bound
them: image tokens once grew to a hundred times the size of text tokens, and the decoder could not change them."""
HIDDEN = -1e30
Ids = NDArray[np.int64]


class Scores:
    """Means of what was seen since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, value: float) -> None:
        self._sums[name][0] += value
        self._sums[name][1] += 1

    def take(self) -> dict[str, float]:
        means = {name: round(total / count, 4) for name, (total, count) in sorted(self._sums.items())}
        self._sums.clear()
        return means


def label_loss(weights: Weights, features: Tensor, batch: Batch, scores: Scores) -> Tensor:
    """Cross-entropies of the patches' labels, distance of their boxes, and how far the features are too large."""
    out = F.linear(F.layer_norm(features, features.shape[-1:]), weights[LABEL_HEAD[0]], weights[LABEL_HEAD[1]])
    loss = (features.square().mean().sqrt() / FEATURE_SIZE).log().relu().square()
    start = 0
    for index, (name, classes) in enumerate(LABELS.items()):
        guess, truth = out[..., start : start + classes].flatten(0, 1), batch.labels[..., index].flatten()
        start += classes
        there = truth > 0
        weight = torch.where(there, 1.0, EMPTY_WEIGHT)
        entropy = F.cross_entropy(guess, truth, reduction="none")
        loss = loss + LABEL_WEIGHT.get(name, 0.5) * (entropy * weight).sum() / weight.sum()
        if there.any():
            scores.add(f"label {name}", (guess[there].argmax(-1) == truth[there]).float().mean().item())
    inside = batch.boxes[..., 0] >= 0
    if inside.any():
        loss = loss + 6 * (out[..., start:][inside] - batch.boxes[inside]).abs().mean()
    return loss


def answer_loss(
    weights: Weights, dialogue: Dialogue, rows: Rows, features: Tensor, per_row: int, scores: Scores
) -> Tensor:
    """Cross-entropy of the answers' tokens, each question about as heavy as any other, however short its answer."""
    row, place, token, question = torch.tensor([(t.row, t.place, t.token, t.question) for t in rows.targets]).unbind(-1)
    guess = logits(weights, hidden_states(weights, dialogue, rows, features, per_row, (row, place)))
    probabilities = guess.log_softmax(-1)
    loss = -probabilities.gather(1, token[:, None])[:, 0]
    coordinate = (token >= FIRST_COORDINATE) & (token < FIRST_COORDINATE + COORDINATES)
    if coordinate.any():
        loss = loss.masked_scatter(coordinate, _coordinate_loss(probabilities[coordinate], token[coordinate]))
    lengths = torch.bincount(question, minlength=len(rows.questions)).clamp_min(1)
    task = torch.tensor([TASK_WEIGHT.get(asked.task, 1.0) for asked in rows.questions])
    weight = (task * lengths**-0.75)[question]
    with torch.no_grad():
        _score(rows, guess.argmax(-1).numpy(), token.numpy(), question.numpy(), scores)
    return (loss * weight).sum() / weight.sum()


def hidden_states(
    weights: Weights, dialogue: Dialogue, rows: Rows, features: Tensor, per_row: int, wanted: tuple[Tensor, Tensor]
) -> Tensor:
    """The decoder's output (wanted, width) at rows and places behind the pictures."""
    count, length = rows.ids.shape
    pictures = project(weights, features).unflatten(0, (count, per_row))
    opening, line_break = (
        embed(weights, torch.tensor(ids)).expand(count, -1, -1) for ids in (dialogue.opening, dialogue.after_picture)
    )
    parts = [opening]
    for index in range(per_row):
        parts += [pictures[:, index], line_break]
    prefix = sum(part.shape[1] for part in parts)
    x = torch.cat([*parts, embed(weights, rows.ids)], 1)
    positions = torch.cat([torch.arange(prefix).expand(count, -1), rows.positions], 1)
    blocks = torch.cat([torch.full((count, prefix), -1), rows.blocks], 1)
    blind = torch.cat([torch.zeros(count, prefix, dtype=torch.bool), rows.blind], 1)
    same = blocks[:, :, None] == blocks[:, None, :]
    picture = (blocks == -1)[:, None, :] & ~blind[:, :, None]
    causal = torch.ones(prefix + length, prefix + length, dtype=torch.bool).tril()
    mask = torch.zeros(same.shape).masked_fill_(~((same | picture) & causal), HIDDEN)
    return decode(weights, MODEL.decoder, x, positions, mask[:, None], (wanted[0], wanted[1] + prefix))


def _coordinate_loss(probabilities: Tensor, token: Tensor) -> Tensor:
    last = FIRST_COORDINATE + COORDINATES - 1
    near = [(token + step).clamp(FIRST_COORDINATE, last) for step in NEIGHBOURS]
    parts = [
        -share * probabilities.gather(1, ids[:, None])[:, 0]
        for ids, share in zip(near, NEIGHBOURS.values(), strict=True)
    ]
    return torch.stack(parts).sum(0)


def _score(
    rows: Rows, guess: NDArray[np.int64], token: NDArray[np.int64], question: NDArray[np.int64], scores: Scores
) -> None:
    """Whether each answer's tokens were all the most likely ones; a box is judged by where it lies, a point is not."""
    right = np.ones(len(rows.questions), bool)
    coordinate = (token >= FIRST_COORDINATE) & (token < FIRST_COORDINATE + COORDINATES)
    np.logical_and.at(right, question, (guess == token) | coordinate)
    for index, asked in enumerate(rows.questions):
        if asked.box is None:
            scores.add(asked.task, float(right[index]))
            continue
        said = guess[(question == index) & coordinate]
        box = read_box(str([float(value) / 100 for value in said - FIRST_COORDINATE]))
        if box is not None:
            scores.add("ground", float(centre_inside(box, asked.box)))
            scores.add("ground overlap", box_overlap(box, asked.box))
