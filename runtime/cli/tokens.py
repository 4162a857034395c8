"""`phisight tokens`: how many tokens a picture costs, from its size or its file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from phisight.cli.budget import add_budget, patch_limits
from phisight.cli.console import Console
from phisight.naflex import PATCH_SIZE, target_size, token_count

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  phisight tokens 4032x3024
  phisight tokens photo.jpg --max-patches 1024"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="WIDTHxHEIGHT|IMAGE", help="a size in pixels, or a file")
    add_budget(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    rows = []
    for picture in args.pictures:
        width, height = _size(picture)
        seen = target_size(width, height, *patch_limits(args))
        rows.append(
            {
                "picture": picture,
                "size": [width, height],
                "seen": list(seen),
                "grid": [seen[1] // PATCH_SIZE, seen[0] // PATCH_SIZE],
                "tokens": token_count(width, height, *patch_limits(args)),
            }
        )
    if args.json:
        console.document(rows)
        return 0
    for row in rows:
        console.line("{picture}: {tokens} tokens, seen as {seen[0]} x {seen[1]} pixels".format(**row))
    return 0


def _size(picture: str) -> tuple[int, int]:
    """From WIDTHxHEIGHT, or from a file, upright."""
    match = re.fullmatch(r"(\d+)x(\d+)", picture)
    if match and not Path(picture).exists():
        return int(match[1]), int(match[2])
    from phisight.images import open_image

    return open_image(picture).size
