"""Tasks that measure seeing: drawn pictures with questions whose answers are known. They need no engine and no torch.

`sample(task, seed)` is one question for evaluation; `draw(task, rng, grid)` a picture with several for training, which
never gets a generator of `sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from phisight.tasks.arithmetic import arithmetic_question
from phisight.tasks.chart import MIN_HEIGHT as MIN_CHART_HEIGHT
from phisight.tasks.chart import chart_scene
from phisight.tasks.count import count_scene
from phisight.tasks.ground import ground_scene
from phisight.tasks.question import Question, Sample
from phisight.tasks.read import read_scene
from phisight.tasks.scene import Scene
from phisight.tasks.sizes import GRIDS, PATCH, Grid, draw_size
from phisight.tasks.two_images import two_images_scene

__all__ = ["TASKS", "Question", "Sample", "Scene", "draw", "evaluation_rng", "grids_of", "sample"]

SCENES: dict[str, Callable[[Random, tuple[int, int]], Scene]] = {
    "read": read_scene,
    "chart": chart_scene,
    "ground": ground_scene,
    "count": count_scene,
    "two_images": two_images_scene,
}
TASKS = ("read", "chart", "ground", "count", "arithmetic", "two_images")
MOST_PATCHES_OF_TWO = 48
"""Of each picture of a pair."""


def grids_of(task: str) -> tuple[Grid, ...]:
    """The grids on which a task with pictures is drawn."""
    if task == "two_images":
        return tuple(grid for grid in GRIDS if grid[0] * grid[1] <= MOST_PATCHES_OF_TWO)
    if task == "chart":
        return tuple(grid for grid in GRIDS if grid[0] * PATCH - 6 >= MIN_CHART_HEIGHT)
    return GRIDS


def draw(task: str, rng: Random, grid: Grid) -> Scene:
    """A scene of any task but arithmetic, whose pictures become `grid` patches when they are preprocessed."""
    return SCENES[task](rng, draw_size(rng, grid))


def evaluation_rng(task: str, seed: int) -> Random:
    return Random(f"phisight evaluation {task} {seed}")


def sample(task: str, seed: int) -> Sample:
    """The evaluation sample of a seed. Raises KeyError for a task that there is not."""
    rng = evaluation_rng(task, seed)
    if task == "arithmetic":
        return Sample((), arithmetic_question(rng))
    scene = draw(task, rng, rng.choice(grids_of(task)))
    return Sample(tuple(canvas.pixels for canvas in scene.canvases), scene.questions[0])
