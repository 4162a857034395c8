"""The stages of training and their settings: data, rates, lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["CONTINUED", "FROM_NOISE", "Stage", "rate_at", "smoke"]


@dataclass(frozen=True)
class Stage:
    """`rate` falls or rises linearly from its first to its last value, after `warmup` steps from 0."""

    name: str
    steps: int
    rate: tuple[float, float]
    mix: Mapping[str, float]
    """Shares of the tasks' pictures; "page" is a dense page of codes."""
    answers: bool = True
    """Whether questions are asked; without, the tower alone learns the patches' labels."""
    label_weight: float = 0.2
    tower_rate: float = 0.6
    """The tower's rate as a share of the decoder's."""
    tokens: int = 4400
    """Image and text tokens of a process and step."""
    text_length: int = 100
    """Most text tokens behind a picture."""
    warmup: int = 30


GLYPHS = {"page": 0.45, "read": 0.1, "ground": 0.25, "chart": 0.08, "count": 0.12}
QUESTIONS = {"read": 0.22, "page": 0.06, "ground": 0.2, "chart": 0.14, "count": 0.18, "two_images": 0.2}

FROM_NOISE = (
    # Answers alone teach the tower too slowly what a glyph is: labels for every patch come first.
    Stage("tower", 2400, (0.02, 0.008), GLYPHS, answers=False, label_weight=1.0, tower_rate=1.0),
    Stage("answers", 3000, (0.008, 0.0075), QUESTIONS),
    # A large part of the gain comes while the rate falls.
    Stage("decay", 6000, (0.0075, 0.0), QUESTIONS),
)
AGAIN = {"read": 0.26, "page": 0.08, "ground": 0.1, "chart": 0.1, "count": 0.24, "two_images": 0.22}
LAST = {"read": 0.3, "page": 0.08, "ground": 0.07, "chart": 0.08, "count": 0.29, "two_images": 0.18}
"""More and more of what is learned last."""
CONTINUED = (
    Stage("tower", 250, (0.01, 0.006), GLYPHS, answers=False, label_weight=1.0, tower_rate=1.0),
    Stage("decay", 2250, (0.0075, 0.0), AGAIN, label_weight=0.3, tower_rate=0.8, text_length=110),
    # Twice more, rising to ever less and falling slowly: count went from 82 to 91 and 95 %, read from 91 to 94.
    Stage("second decay", 1700, (0.0035, 0.0), LAST, label_weight=0.3, tower_rate=0.8, text_length=110),
    Stage("third decay", 1700, (0.0025, 0.0), LAST, label_weight=0.3, tower_rate=0.8, text_length=110),
)
"""For weights that were trained before, as on other data: the tower's labels start anew, the rates rise again."""


def smoke(recipe: Sequence[Stage]) -> tuple[Stage, ...]:
    """The same stages in a minute, to see that they run."""
    return tuple(replace(stage, steps=2, tokens=600, warmup=1) for stage in recipe)


def rate_at(stage: Stage, step: int) -> float:
    """The rate of a stage's step, counted from 0."""
    first, last = stage.rate
    return (first + (last - first) * step / stage.steps) * min(1.0, (step + 1) / stage.warmup)
