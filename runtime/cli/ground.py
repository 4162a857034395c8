"""`phisight ground`: where in a picture is what an instruction is about."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from phisight.cli.album import with_box
from phisight.cli.asking import (
    StageBars,
    add_length_options,
    add_model_options,
    check_request,
    load_model,
    options_from,
)
from phisight.cli.budget import note_budget, told_budget
from phisight.cli.console import Console
from phisight.cli.png import check_png, write_png
from phisight.grounding import Grounding
from phisight.images import open_image

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """The likeliest answer is taken. Pixels are those of the upright picture: its EXIF orientation is applied.

examples:
  phisight ground demo screen.png "click the Save button"
  phisight ground phi4-int4 screen.png "open the settings" --draw found.png
  phisight ground phi4-int4 screen.png "type in the search field" --json"""

OUTLINE_SHARE = 300
"""The outline of a box is a pixel wide for so many of the picture's shorter side, and two at least."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an exported model directory, or demo")
    parser.add_argument("image", metavar="IMAGE", help="a picture, such as a screenshot")
    parser.add_argument("instruction", metavar="INSTRUCTION", help="what to find, such as: click the Save button")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the picture with the box, as PNG")
    parser.add_argument("--force", action="store_true", help="replace OUT.png if it exists")
    add_length_options(parser)
    add_model_options(parser)
    parser.add_argument("--stats", action="store_true", help="show counts, stage times and choices")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.set_defaults(temperature=0.0)


def run(args: argparse.Namespace, console: Console) -> int:
    if args.draw is not None:
        check_png(args.draw, force=args.force)
    check_request(args, [args.image])
    image = open_image(args.image)
    model = load_model(args)
    note_budget(args, console)
    with StageBars(console) as bars:
        found = model.ground(
            image,
            args.instruction,
            mode=args.mode,
            options=options_from(args, model),
            max_patches=args.max_patches,
            progress=bars.show,
        )
    for note in (*model.notes, *found.notes) if args.stats else found.notes:
        console.note(f"phisight: note: {note}")
    if args.draw is not None:
        width = max(2, min(image.size) // OUTLINE_SHARE)
        write_png(Image.fromarray(with_box(np.asarray(image), found.box, width)), args.draw)
    if args.json:
        console.document(_as_json(args, found, model.notes))
    else:
        left, top, right, bottom = found.pixels
        console.line(f"box    {left}, {top} to {right}, {bottom} of {found.width} x {found.height} pixels")
        console.line(f"click  {found.point[0]}, {found.point[1]}")
    if args.stats:
        for line in found.answer.stats.lines():
            console.note(line)
    return 0


def _as_json(args: argparse.Namespace, found: Grounding, notes: tuple[str, ...]) -> dict[str, object]:
    return {
        "model": args.model,
        "image": args.image,
        "instruction": args.instruction,
        **found.as_json(),
        "drawn": None if args.draw is None else str(args.draw),
        "text": found.answer.text,
        "thought": found.answer.thought,
        "finish_reason": found.answer.finish_reason,
        "stats": found.answer.stats.as_json(),
        "notes": [*notes, *found.notes],
        **told_budget(args),
    }
