"""The arguments that bound a picture's patches, where no model says so."""

from __future__ import annotations

import argparse
import re

from phisight.errors import InputError
from phisight.naflex import MAX_PATCHES, MIN_PATCHES

__all__ = ["add_budget", "patch_limits", "read_seconds"]


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-patches", type=int, default=MAX_PATCHES, metavar="N", help=f"most patches (default: {MAX_PATCHES})"
    )
    parser.add_argument(
        "--min-patches", type=int, metavar="N", help=f"fewest patches (default: {MIN_PATCHES}, or the most if less)"
    )


def patch_limits(args: argparse.Namespace) -> tuple[int, int]:
    """(most, fewest) patches."""
    fewest = min(MIN_PATCHES, args.max_patches) if args.min_patches is None else args.min_patches
    return args.max_patches, fewest


def read_seconds(option: str, text: str) -> float:
    """ "20s", "1.5 min" or "20", which is seconds. Raises InputError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min)?\s*", text)
    seconds = 0.0 if match is None else float(match[1]) * (60 if match[2] == "min" else 1)
    if seconds <= 0:
        raise InputError(f"{option} is {text!r}, wanted a time such as 20s or 2min")
    return seconds
