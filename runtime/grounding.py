"""Where a control is in a picture: the official grounding prompt, and an answer that can be clicked on.

picture (upright), instruction -> prompt -> answer "[x1, y1, x2, y2]" in shares of the sides -> pixels, click point

The model sees the picture stretched to its grid, never padded: a share of the grid's side is that of the picture's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phisight.answer import Answer, collect
from phisight.cached_decoder import Cancel
from phisight.constraint import Constraint
from phisight.constraint_llguidance import is_installed
from phisight.errors import AnswerError, Cancelled, InputError
from phisight.images import ImageSource, open_image
from phisight.options import GenerateOptions
from phisight.prompt import Mode
from phisight.tasks.ground import PROMPT
from phisight.tasks.question import Box, read_box

if TYPE_CHECKING:
    from phisight.model import Model, StageProgress

__all__ = ["BOX", "Grounding", "ground", "locate"]

_SHARE = r"(0(\.[0-9]{1,4})?|1(\.0{1,4})?)"
BOX = Constraint.grammar(rf"start: /\[({_SHARE}, ?){{3}}{_SHARE}\]/")
"""Four shares from 0 to 1, with up to the four decimals that the prompt asks for."""

UNCHECKED = (
    "llguidance is not installed, so the model was free to answer with something else than a box: "
    'pip install "phisight[schema]"'
)


@dataclass(frozen=True)
class Grounding:
    """A box in a picture of `width` x `height` pixels, which is upright: its EXIF orientation is applied.

    box: x1, y1, x2, y2 as shares of the sides, 0 to 1, with x1 <= x2 and y1 <= y2.
    answer: what the model said.
    notes: what was repaired or not enforced.
    """

    box: Box
    width: int
    height: int
    answer: Answer
    notes: tuple[str, ...] = ()

    @property
    def pixels(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom edge in pixels: 0 is the picture's first edge, `width` or `height` its last."""
        x1, y1, x2, y2 = self.box
        return round(x1 * self.width), round(y1 * self.height), round(x2 * self.width), round(y2 * self.height)

    @property
    def point(self) -> tuple[int, int]:
        """Column and row, from 0, of the pixel in the box's centre: where to click."""
        x1, y1, x2, y2 = self.box
        column, row = int((x1 + x2) / 2 * self.width), int((y1 + y2) / 2 * self.height)
        return min(column, self.width - 1), min(row, self.height - 1)

    def as_json(self) -> dict[str, object]:
        """Box, pixels, click point and the picture's size."""
        return {
            "box": self.box,
            "pixels": self.pixels,
            "point": self.point,
            "width": self.width,
            "height": self.height,
        }


def ground(
    model: Model,
    image: ImageSource,
    instruction: str,
    *,
    mode: Mode = "auto",
    options: GenerateOptions | None = None,
    max_patches: int | None = None,
    cancel: Cancel | None = None,
    progress: StageProgress | None = None,
) -> Grounding:
    """Find what an instruction such as "click the save button" is about.

    Without `options` the likeliest answer is taken. The form of a box is enforced where llguidance is installed, unless
    the options have a constraint of their own.

    Raises AnswerError for an answer that gives no box within the picture, Cancelled, and as `Model.stream`.
    """
    if not instruction.strip():
        raise InputError('the instruction is empty: say what to find, such as "click the save button"')
    options = options or model.options(temperature=0)
    notes: tuple[str, ...] = ()
    if options.constraint is None and is_installed():
        options = replace(options, constraint=BOX)
    elif options.constraint is None:
        notes = (UNCHECKED,)
    upright = open_image(image)
    prompt = model.prompt(PROMPT.format(instruction.strip()), 1, mode=mode)
    chunks = model.stream_prompt(prompt, [upright], options, max_patches=max_patches, cancel=cancel, progress=progress)
    answer = collect(chunks, prompt.notes)
    if answer.finish_reason == "cancelled":
        raise Cancelled("cancelled before the answer was complete")
    return locate(answer, upright.size, (*prompt.notes, *notes))


def locate(answer: Answer, size: tuple[int, int], notes: tuple[str, ...] = ()) -> Grounding:
    """The first box of an answer, in a picture of (width, height) pixels.

    Where it runs from right to left or from bottom to top, its sides are swapped, and a note says so.

    Raises AnswerError where there is no box, or one that leaves the picture.
    """
    box = read_box(answer.text)
    if box is None:
        found = f"the answer is {_short(answer.text)}, wanted a box [x1, y1, x2, y2]"
        if answer.finish_reason == "length":
            raise AnswerError(f"{found}: it was cut by the limit of tokens, so raise max_tokens or the context")
        raise AnswerError(f"{found}: put the instruction in other words")
    if max(box) > 1:
        raise AnswerError(
            f"the box {list(box)} leaves the picture, wanted shares of its sides from 0 to 1: "
            "put the instruction in other words"
        )
    x1, y1, x2, y2 = box
    upright = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    if upright != box:
        notes = (*notes, f"the box {list(box)} was turned around: its sides are swapped")
    return Grounding(upright, *size, answer, notes)


def _short(text: str) -> str:
    """For messages: one line of at most 80 characters."""
    line = re.sub(r"\s+", " ", text).strip()
    return repr(line if len(line) <= 80 else f"{line[:77]}...")
