"""What a task draws: pictures and the questions that can be asked about them."""

from __future__ import annotations

from dataclasses import dataclass

from phisight.tasks.canvas import Canvas
from phisight.tasks.question import Question

__all__ = ["Scene"]


@dataclass(frozen=True)
class Scene:
    """All questions are about all of the pictures. Training asks several of them, evaluation the first."""

    canvases: tuple[Canvas, ...]
    questions: tuple[Question, ...]
