"""The arguments that bound a picture's patches, where no model says so."""

from __future__ import annotations

import argparse

from phisight.naflex import MAX_PATCHES, MIN_PATCHES

__all__ = ["add_budget", "patch_limits"]


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
