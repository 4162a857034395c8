"""The arguments that bound a picture's patches: a number, or what a time to the first token allows."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phisight.cli.cache import chosen_cache, identity_of
from phisight.cli.console import Console
from phisight.errors import InputError
from phisight.model import Model
from phisight.naflex import MAX_PATCHES, MIN_PATCHES
from phisight.threads import choose_threads, read_threads

if TYPE_CHECKING:
    from phisight.planner.budget import BudgetChoice

__all__ = [
    "add_budget",
    "add_patch_options",
    "check_budget",
    "note_budget",
    "patch_limits",
    "read_seconds",
    "settle",
    "told_budget",
]

AUTO = "auto"
DEFAULT_SECONDS = 20.0
QUESTION = 32
"""Positions of text that are reckoned with beside what every prompt has."""


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


def add_patch_options(parser: argparse.ArgumentParser) -> None:
    """--max-patches and --ttft, for `settle`."""
    parser.add_argument(
        "--max-patches",
        type=_patches,
        metavar="N",
        help="most patches per image, or auto: as many as --ttft allows (default: the model's)",
    )
    parser.add_argument(
        "--ttft",
        metavar="S",
        help=f"seconds to the first token for --max-patches auto, such as 20s (default: {DEFAULT_SECONDS:g}s)",
    )


def check_budget(args: argparse.Namespace) -> float | None:
    """The target of --max-patches auto in seconds; None for a number of patches. Raises InputError."""
    given = getattr(args, "ttft", None)
    if getattr(args, "max_patches", None) not in (None, AUTO) and given is not None:
        raise InputError(f"--ttft chooses the patches, but --max-patches is {args.max_patches}: leave one of them out")
    if given is not None:
        return read_seconds("--ttft", given)
    return DEFAULT_SECONDS if getattr(args, "max_patches", None) == AUTO else None


def settle(args: argparse.Namespace, model: Model, path: str | Path) -> None:
    """Put the number that auto stands for into `args.max_patches`, and the choice into `args.budget`, else None.

    Raises InputError for a target that is too short, ImageError for a text-only model.
    """
    args.budget = None
    target = check_budget(args)
    if target is None:
        return
    from phisight.planner.opened import budget_of, rates_of  # what times stages is needed for auto alone

    threads = choose_threads(read_threads(args.threads)).count
    rates = rates_of(model, chosen_cache(args), identity_of(args, model, path), threads)
    pictures = getattr(args, "image", None)
    images = max(1, len(pictures)) if isinstance(pictures, list) else 1
    text = len(model.prompt(getattr(args, "prompt", "")).ids) + QUESTION
    args.budget = budget_of(model, rates, text=text, images=images, target=target)
    args.max_patches = args.budget.patches


def told_budget(args: argparse.Namespace) -> dict[str, Any]:
    """What a JSON document tells of auto's choice: nothing without it."""
    return {} if args.budget is None else {"budget": args.budget.as_json()}


def note_budget(args: argparse.Namespace, console: Console) -> None:
    """Say what auto chose, and why."""
    choice: BudgetChoice | None = args.budget
    if choice is not None:
        console.note(
            f"phisight: note: {choice.patches} patches per image: the first token is predicted after "
            f"{choice.seconds:.1f} s, within {choice.target:g} s"
        )


def _patches(text: str) -> int | str:
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None
