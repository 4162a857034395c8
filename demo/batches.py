"""Draws what one step trains on: pictures of one grid, their patches and labels, and their questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from phisight.tasks import Question, Scene, draw, grids_of
from phisight.tasks.canvas import Canvas
from phisight.tasks.sizes import GRIDS, PATCH, Grid, draw_size
from phisight.training.aids import more_questions, page_scene
from phisight.training.labels import label_patches

__all__ = ["Batch", "draw_batch", "training_rng"]

PAIR = "two_images"


@dataclass(frozen=True)
class Batch:
    """`pictures` of one grid: patches (pictures * per_row, rows * columns, 768) float32, labels and boxes alike."""

    grid: Grid
    per_row: int
    """Pictures that a question is about: 1 or 2."""
    patches: Tensor
    labels: Tensor
    boxes: Tensor
    questions: tuple[tuple[Question, ...], ...]


def training_rng(*names: object) -> Random:
    """A generator that no evaluation uses: its seed begins with another word."""
    return Random(" ".join(["phisight training", *map(str, names)]))


def draw_batch(rng: Random, mix: Mapping[str, float], tokens: int, text_length: int) -> Batch:
    """A batch of about `tokens` image and text tokens; `mix` gives each task's share of the batches or pictures."""
    pair = rng.random() < mix.get(PAIR, 0) / sum(mix.values())
    grid = rng.choice(grids_of(PAIR) if pair else GRIDS)
    count = max(4, round(tokens / (grid[0] * grid[1] * (2 if pair else 1) + text_length)))
    if pair:
        names = [PAIR] * count
    else:
        fitting = {name: share for name, share in mix.items() if name == "page" or grid in grids_of(name)}
        fitting.pop(PAIR, None)
        names = rng.choices(list(fitting), list(fitting.values()), k=count)
    scenes = [page_scene(rng, draw_size(rng, grid)) if name == "page" else draw(name, rng, grid) for name in names]
    canvases = [canvas for scene in scenes for canvas in scene.canvases]
    labels, boxes = zip(*(label_patches(canvas, grid) for canvas in canvases), strict=True)
    return Batch(
        grid,
        2 if pair else 1,
        torch.from_numpy(np.stack([_patches(canvas, grid) for canvas in canvases])),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(boxes)),
        tuple(_questions(rng, scene) for scene in scenes),
    )


def _questions(rng: Random, scene: Scene) -> tuple[Question, ...]:
    """The scene's questions in any order, then those that only training asks."""
    questions = list(scene.questions)
    rng.shuffle(questions)
    return (*questions, *more_questions(rng, scene))


def _patches(canvas: Canvas, grid: Grid) -> NDArray[np.float32]:
    """(patches, 768) float32 in [-1, 1], as the model's preprocessing makes them."""
    size = (grid[1] * PATCH, grid[0] * PATCH)
    pixels = canvas.pixels
    if (canvas.width, canvas.height) != size:
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    cut = pixels.reshape(grid[0], PATCH, grid[1], PATCH, 3).transpose(0, 2, 1, 3, 4)
    return cut.reshape(grid[0] * grid[1], -1).astype(np.float32) / np.float32(127.5) - 1
