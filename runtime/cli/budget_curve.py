"""`phisight bench --budget-curve`: what more image tokens buy, in right answers, and what they cost, in seconds."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from phisight.cli.console import Console
from phisight.cli.eval import DRAWN_MAX_TOKENS, drawn_tasks, own_cases
from phisight.compare.curves import curves
from phisight.compare.plots import Axis
from phisight.config import ImageBudget
from phisight.errors import InputError
from phisight.evaluate import Cases, DrawnCases, EvaluationSettings, Result, evaluate
from phisight.evaluate.report import Score
from phisight.loading import load
from phisight.model import Model

__all__ = ["add_curve_options", "run_curve"]

SEEING = "read,chart,ground,count,two_images"
"""Tasks whose answers are in the picture."""
DEFAULT_N = 30
STEPS = 5


def add_curve_options(parser: argparse.ArgumentParser) -> None:
    curve = parser.add_argument_group("right answers against image tokens")
    curve.add_argument("--budget-curve", action="store_true", help="ask at several --max-patches instead of timing")
    curve.add_argument(
        "--tasks", metavar="TASKS", help=f"drawn tasks, or a folder of your cases as for eval (default: {SEEING})"
    )
    curve.add_argument("--n", type=int, metavar="N", help=f"questions of each task (default: {DEFAULT_N})")
    curve.add_argument("--patches", metavar="LIST", help="budgets, with commas (default: five up to the model's most)")
    curve.add_argument("--out", type=Path, metavar="FILE.svg", help="draw the curves; an older file is replaced")


def run_curve(args: argparse.Namespace, threads: int, console: Console) -> int:
    """Raises InputError, ImageError, and what opening the model raises."""
    args.tasks = args.tasks or SEEING
    if args.n is not None and args.n < 1:
        raise InputError(f"--n is {args.n}, wanted 1 or more")
    args.n = DEFAULT_N if args.n is None else args.n
    drawn = drawn_tasks(args)
    suite: Mapping[str, Cases] = (
        {task: DrawnCases(task, range(args.n)) for task in drawn} if drawn else own_cases(args, console)
    )
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise InputError(f"{args.out.absolute().parent} is no directory: make it, or give another --out")
    model = load(args.model, threads=threads)
    rows = list(_rows(model, suite, _budgets(args.patches, model.budget), bool(drawn), console))
    if args.out is not None:
        _write(args.out, curves(f"right answers of {args.model} against image tokens", _lines(rows), TOKENS, RIGHT))
    if args.json:
        console.document({"model": str(args.model), "from": args.tasks, "threads": threads, "rows": rows})
        return 0
    console.line(
        f"{'task':<14}{'max patches':>12}{'tokens':>9}{'questions':>11}{'right':>9}   {'95 % interval':<17}"
        f"{'first token':>12}"
    )
    for row in rows:
        low, high = row["interval"]
        console.line(
            f"{row['task']:<14}{row['max_patches']:>12}{row['image_tokens']:>9.0f}{row['n']:>11}"
            f"{100 * row['right']:>7.1f} %   {f'{100 * low:.1f} to {100 * high:.1f} %':<17}"
            f"{row['first_token_s']:>10.3f} s"
        )
    return 0


TOKENS = Axis("image tokens of a question", "less")
RIGHT = Axis("right answers in %", "more")


def _budgets(given: str | None, budget: ImageBudget) -> list[int]:
    """In rising order. Raises InputError."""
    if given is None:
        ratio = budget.max_patches / budget.min_patches
        return sorted({round(budget.min_patches * ratio ** (step / (STEPS - 1))) for step in range(STEPS)})
    try:
        found = sorted({int(part) for part in given.split(",")})
    except ValueError:
        raise InputError(f"--patches is {given!r}, wanted whole numbers with commas, such as 256,1024,3600") from None
    if not 1 <= found[0] <= found[-1] <= budget.max_patches:
        raise InputError(f"--patches is {given}, wanted numbers of 1 to {budget.max_patches}")
    return found


def _rows(
    model: Model, suite: Mapping[str, Cases], budgets: Sequence[int], drawn: bool, console: Console
) -> Iterator[dict[str, Any]]:
    options = model.options(temperature=0, **({"max_tokens": DRAWN_MAX_TOKENS} if drawn else {}))
    total = len(budgets) * sum(len(cases) for cases in suite.values())
    with console.progress("budget curve", total, " questions", scale=False) as bar:
        for task, cases in suite.items():
            for patches in budgets:
                bar.tell(f"{task} at {patches}")
                results = []
                for result, _ in evaluate(model, cases, EvaluationSettings(options, max_patches=patches)):
                    results.append(result)
                    bar.add(1)
                yield _row(task, patches, results)


def _row(task: str, patches: int, results: Sequence[Result]) -> dict[str, Any]:
    """A question that failed counts as wrong. Raises InputError if all did."""
    answered = [result.answer.stats for result in results if result.answer is not None]
    if not answered:
        raise InputError(f"no question of {task} could be asked at {patches} patches: {results[0].error}")
    seconds = [stats.preprocess_seconds + stats.encode_seconds + stats.prefill_seconds for stats in answered]
    score = Score.of(results)
    return {
        "task": task,
        "max_patches": patches,
        "image_tokens": sum(stats.image_tokens for stats in answered) / len(answered),
        "n": score.n,
        "right": score.share,
        "interval": list(score.interval),
        "errors": len(results) - len(answered),
        "first_token_s": sum(seconds) / len(seconds),
    }


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["task"], []).append((row["image_tokens"], 100 * row["right"]))
    return lines


def _write(path: Path, text: str) -> None:
    """Under its name only when complete. Raises InputError."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise InputError(f"--out {path} cannot be written: {error.strerror or error}") from None
