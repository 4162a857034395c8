"""`phisight eval`: ask a model questions whose answers are known, and tell how many it gets right."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from phisight.cli.asking import (
    add_model_options,
    add_prompt_options,
    check_request,
    options_from,
    system_messages,
)
from phisight.cli.budget import note_budget
from phisight.cli.console import Console
from phisight.cli.scores import score_header, score_notes, score_row
from phisight.cli.temporary_export import opened_model
from phisight.errors import InputError
from phisight.evaluate import (
    Case,
    Cases,
    DrawnCases,
    EvaluationSettings,
    FailureFolder,
    Result,
    TaskReport,
    evaluate,
    read_folder,
)
from phisight.evaluate.folder import FILE_NAME
from phisight.model import Model
from phisight.prompt import user_message
from phisight.tasks import TASKS

__all__ = ["DRAWN_MAX_TOKENS", "EXAMPLES", "add_arguments", "drawn_tasks", "own_cases", "run"]

EXAMPLES = f"""--tasks demo draws pictures and questions for all six tasks: {", ".join(TASKS)}.
Question number S of a task is the same everywhere, and training never uses it. An answer to ground is right if the
centre of its box lies in the true one; all other answers must be exact. Every answer is the model's likeliest.

--tasks FOLDER asks your own questions. FOLDER/{FILE_NAME} has one JSON object a line:
  question    the text; image: a file in FOLDER, or a list of files
  expected    a text, a list of accepted texts, a number, or a box [x1, y1, x2, y2] in shares of the picture, 0 to 1
  metric      exact: the answer is the text (usual for texts)
              contains: the text stands in the answer as whole words, in capitals or not
              number: the last number in the answer, at most "tolerance" off (usual for numbers)
              box: the centre of the answer's box lies in the expected one (usual for boxes)
  task, mode, id    group in the report (default: cases), auto, think or nothink, and a name of your own

The table shows shares of right answers with Wilson's 95 % interval, and what always giving the most frequent answer
would score; --json has the scores of subtasks and aspect ratios too.
Exit code 1 if any question ended in an error (it counts as wrong), 2 if nothing could be begun.

examples:
  phisight eval demo
  phisight eval demo-int4 --tasks read,chart --n 500 --json
  phisight eval demo --tasks ground --n 50 --save-failures wrong
  phisight eval model-q4_0.gguf --mmproj mmproj-f16.gguf
  phisight eval phi4-int4 --tasks receipts --max-patches 1024 --mode nothink
  phisight eval phi4-int4 --tasks receipts --blank"""

DEFAULT_N = 100
DRAWN_MAX_TOKENS = 96
"""Enough for every thought and answer to a drawn question; what goes on longer goes in circles."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a model directory, a GGUF file, a checkpoint directory, or demo"
    )
    parser.add_argument(
        "--tasks",
        default="demo",
        metavar="TASKS",
        help="demo (default), some of its tasks, or a folder of your own cases",
    )
    parser.add_argument(
        "--n", type=int, metavar="N", help=f"questions of each task (default: {DEFAULT_N}, or all of a folder)"
    )
    parser.add_argument(
        "--seed", dest="first_seed", type=int, metavar="S", help="draw the questions S to S + N - 1 (default: 0)"
    )
    parser.add_argument("--blank", action="store_true", help="show even grey pictures: what can be had without seeing")
    parser.add_argument("--save-failures", type=Path, metavar="DIR", help="a new folder for wrong answers and pictures")
    add_prompt_options(parser)
    add_model_options(parser)
    parser.set_defaults(temperature=0.0)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    started = perf_counter()
    seeds = _seeds(args)
    suite = own_cases(args, console) if seeds is None else {task: DrawnCases(task, seeds) for task in drawn_tasks(args)}
    check_request(args)
    failures = None if args.save_failures is None else FailureFolder(args.save_failures)
    reports: dict[str, TaskReport] = {}
    interrupted = False
    with opened_model(args, console) as model:
        note_budget(args, console)
        settings = _settings(args, model, drawn=seeds is not None)
        _check(model, suite, settings, console)
        if failures is not None:
            failures.make()
        console.line(score_header())
        try:
            for task, cases in suite.items():
                _ask(task, cases, model, settings, failures, reports, console)
        except KeyboardInterrupt:
            interrupted = True
    summary = {
        "model": args.model,
        "notes": list(model.notes),
        "from": args.tasks,
        "seeds": None if seeds is None else [seeds[0], seeds[-1]],
        "mode": args.mode,
        "blank": args.blank,
        "max_patches": args.max_patches,
        "max_tokens": settings.options.max_tokens,
        "thinking_budget": args.thinking_budget,
        "interrupted": interrupted,
        "seconds": perf_counter() - started,
        "tasks": {task: report.as_json() for task, report in reports.items()},
    }
    for note in score_notes(reports.values(), settings):
        console.note(note)
    if args.json:
        console.document(summary)
    if interrupted:
        raise KeyboardInterrupt
    return 1 if any(report.errors for report in reports.values()) else 0


def _ask(
    task: str,
    cases: Cases,
    model: Model,
    settings: EvaluationSettings,
    failures: FailureFolder | None,
    reports: dict[str, TaskReport],
    console: Console,
) -> None:
    """Ask a task's questions and report them; those that were asked when something ends it early, too."""
    done: list[Result] = []
    right = 0
    try:
        with console.progress(task, len(cases), " questions", scale=False) as bar:
            for result, pictures in evaluate(model, cases, settings):
                if failures is not None and not result.verdict.right:
                    failures.add(result, pictures)
                done.append(result)
                right += result.verdict.right
                bar.tell(f"{right / len(done):.1%} right")
                bar.add(1)
    finally:
        if done:
            reports[task] = TaskReport.of(done, len(cases))
            console.line(score_row(task, reports[task]))


def _seeds(args: argparse.Namespace) -> range | None:
    """The seeds of drawn questions; None for a folder. Raises InputError."""
    if args.n is not None and args.n < 1:
        raise InputError(f"--n is {args.n}: give a whole number, 1 or more")
    if not drawn_tasks(args):
        if args.first_seed is not None:
            raise InputError("--seed is for drawn questions, and --tasks is a folder: leave it out")
        return None
    first = 0 if args.first_seed is None else args.first_seed
    if first < 0:
        raise InputError(f"--seed is {first}: give a whole number, 0 or more")
    return range(first, first + (DEFAULT_N if args.n is None else args.n))


def drawn_tasks(args: argparse.Namespace) -> tuple[str, ...]:
    """The tasks that --tasks names; none if it names a folder. Raises InputError if it is neither."""
    if args.tasks == "demo":
        return TASKS
    names = tuple(dict.fromkeys(name.strip() for name in args.tasks.split(",")))
    if all(name in TASKS for name in names):
        return names
    if not Path(args.tasks).is_dir():
        raise InputError(f"--tasks is {args.tasks!r}: give demo, some of {','.join(TASKS)}, or a folder of your cases")
    return ()


def own_cases(args: argparse.Namespace, console: Console) -> dict[str, Sequence[Case]]:
    """The user's cases by task, the first --n of each. Raises InputError once all bad lines are told."""
    tasks, problems = read_folder(Path(args.tasks))
    for problem in problems:
        console.note(f"phisight: {problem}")
    if problems:
        raise InputError(f"{Path(args.tasks) / FILE_NAME}: {len(problems)} cases cannot be asked: mend the lines above")
    return {task: cases[: args.n] for task, cases in tasks.items()}


def _settings(args: argparse.Namespace, model: Model, *, drawn: bool) -> EvaluationSettings:
    options = options_from(args, model)
    if drawn and options.max_tokens is None:
        options = replace(options, max_tokens=DRAWN_MAX_TOKENS)
    opening, system_block = system_messages(args.system)
    return EvaluationSettings(options, args.mode, tuple(opening), system_block, args.max_patches, args.blank)


def _check(model: Model, suite: Mapping[str, Cases], settings: EvaluationSettings, console: Console) -> None:
    """What would go wrong with every question. Raises PromptError, ImageError, InputError."""
    opening = [*settings.opening, user_message("?")]
    for note in model.prompt(opening, mode=settings.mode, system_block=settings.system_block).notes:
        console.note(f"phisight: note: {note}")
    if any(next(iter(cases)).pictures for cases in suite.values()):
        model.preprocess(np.zeros((64, 64, 3), np.uint8), settings.max_patches)
