"""`phisight resize`: write exactly what the model sees, which other programs then pass on unchanged."""

from __future__ import annotations

import argparse
from pathlib import Path

from phisight.cli.budget import add_budget, patch_limits
from phisight.cli.console import Console
from phisight.cli.png import check_png, write_png
from phisight.naflex import PATCH_SIZE, resize

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  phisight resize photo.jpg seen.png
  phisight resize photo.jpg seen.png --max-patches 1024 --force"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a picture in any common format")
    parser.add_argument("out", metavar="OUT.png", help="where to write it, as PNG")
    add_budget(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT.png if it exists")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    out = Path(args.out)
    check_png(out, force=args.force)
    seen = resize(args.image, *patch_limits(args))
    write_png(seen, out)
    width, height = seen.size
    tokens = width * height // PATCH_SIZE**2
    if args.json:
        console.document({"out": str(out), "seen": [width, height], "tokens": tokens})
    else:
        console.line(f"{out}: {width} x {height} pixels, {tokens} tokens")
    return 0
