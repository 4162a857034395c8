"""`phisight batch`: a file of questions becomes a file of answers; a second run goes on where the first stopped."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from phisight.cli.answer_rows import AnswerRows, Row
from phisight.cli.asking import (
    SAMPLING,
    add_model_options,
    add_question_options,
    constraint_from,
    load_model,
    options_from,
)
from phisight.cli.budget import check_budget
from phisight.cli.cases import Case, read_cases
from phisight.cli.console import Console
from phisight.constraint_llguidance import check_constraint
from phisight.errors import InputError, PhisightError
from phisight.loading import model_directory
from phisight.manifest import Manifest
from phisight.model import Model
from phisight.options import GenerateOptions

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """Each line of CASES is a JSON object with "prompt" or "messages", and if wanted "image" or "images" (paths
relative to CASES), "id", "system", "mode", "max_patches", "max_tokens", "temperature", "top_p", "top_k", "min_p",
"repetition_penalty", "seed", "stop", "thinking_budget". What a case says goes before the options here.

Each line of ANSWERS has "line" and "id" of its case, and "text", "thought", "finish_reason", "stats" and "notes", or
"error". Rows are in the order of the cases once all are done.

Run it again after a break: answers are kept, errors are tried again. Answers that belong to other cases, another model
or other options are refused; a picture that changed under its name is not noticed.
Exit code 1 if any case ended in an error, 2 if nothing could be begun.

examples:
  phisight batch demo cases.jsonl --out answers.jsonl
  phisight batch phi4-int4 cases.jsonl --out answers.jsonl --temperature 0 --max-tokens 500 --json"""

SHOWN_ERRORS = 10
"""Errors that are told on standard error; the rest is counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an exported model directory, or demo")
    parser.add_argument("cases", metavar="CASES", type=Path, help="a file with one JSON object on each line")
    parser.add_argument("--out", metavar="ANSWERS", type=Path, required=True, help="the file of answers")
    add_question_options(parser)
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="a summary as one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    started = perf_counter()
    if check_budget(args) is not None:
        raise InputError(
            "--max-patches auto goes by the speed of the moment, and a batch that goes on later would change: name a "
            "number (phisight plan tells what a time allows)"
        )
    cases = read_cases(args.cases, _settings(args))
    answers = AnswerRows(args.out)
    kept = _kept(answers, args, cases)
    open_cases = [case for case in cases if case.key not in kept]
    rows = dict(kept)
    if open_cases:
        model = load_model(args)
        options = options_from(args, model)
        answers.replace(kept.values())
        try:
            with console.progress("batch", len(open_cases), " cases", scale=False) as bar:
                for case in open_cases:
                    rows[case.key] = _answer(case, model, options, args)
                    answers.append(rows[case.key])
                    bar.add(1)
        except KeyboardInterrupt:
            console.note(f"phisight: {len(rows)} of {len(cases)} cases are done: run it again to go on")
            raise
    ordered = [rows[case.key] | {"line": case.line} for case in cases]
    answers.replace(ordered)
    answered = [row for case in open_cases if "error" not in (row := rows[case.key])]
    errors = [{name: row[name] for name in ("line", "id", "error")} for row in ordered if "error" in row]
    summary = {
        "model": args.model,
        "out": str(args.out),
        "cases": len(cases),
        "kept": len(kept),
        "answered": len(answered),
        "cut": sum(row["finish_reason"] == "length" for row in answered),
        "errors": errors,
        "generated_tokens": sum(row["stats"]["generated_tokens"] for row in answered),
        "seconds": perf_counter() - started,
    }
    if args.json:
        console.document(summary)
    _tell(summary, console)
    return 1 if errors else 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the answers beside the cases: the model's files, and what was said on the command line."""
    opened = ("accuracy_level", "context", "vision_engine", "kv", "prompt_lookup")
    names = (*SAMPLING, "mode", "system", "max_patches", *opened)
    said = {name: value for name in names if (value := getattr(args, name)) is not None}
    if (constraint := constraint_from(args)) is not None:
        check_constraint(constraint)
        said["constraint"] = [constraint.kind, constraint.text]
    return {**said, "model": _identity(args)}


def _identity(args: argparse.Namespace) -> dict[str, Any]:
    """What the model is: its files' hashes, or the sizes of bare GGUF files, which have no manifest."""
    path = model_directory(args.model)
    if path.is_file():
        bare = [path] if args.mmproj is None else [path, Path(args.mmproj)]
        return {file.name: file.stat().st_size for file in bare if file.is_file()}
    return {name: entry.sha256 for name, entry in Manifest.read(path).files.items()}


def _kept(answers: AnswerRows, args: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Row]:
    """The answers that are there already, by key, in the file's order. Raises InputError."""
    if not args.out.parent.is_dir():
        raise InputError(f"{args.out.parent} is no directory: make it, or give another --out")
    rows = [row for row in answers.read() if "error" not in row]
    keys = {case.key for case in cases}
    strangers = [row for row in rows if row["case"] not in keys]
    if strangers:
        raise InputError(
            f"{args.out} has {len(strangers)} answers to other cases, or by another model or with other options "
            f"(the first: line {strangers[0].get('line')}, id {strangers[0].get('id')!r}): give another --out"
        )
    return {row["case"]: row for row in rows}


def _answer(case: Case, model: Model, options: GenerateOptions, args: argparse.Namespace) -> Row:
    """The row of a case: its answer, or the error that it ended in."""
    row: Row = {"line": case.line, "id": case.id, "case": case.key}
    question = case.question
    if isinstance(question, str):
        return row | {"error": question}
    try:
        answer = model.generate(
            question.messages,
            question.images,
            mode=question.mode or args.mode,
            options=replace(options, **question.changes),
            system_block=question.system_block,
            max_patches=args.max_patches if question.max_patches is None else question.max_patches,
        )
    except PhisightError as error:
        return row | {"error": " ".join(str(error).split())}
    return row | {
        "text": answer.text,
        "thought": answer.thought,
        "finish_reason": answer.finish_reason,
        "stats": answer.stats.as_json(),
        "notes": list(answer.notes),
    }


def _tell(summary: dict[str, Any], console: Console) -> None:
    """The summary for people."""
    errors = summary["errors"]
    for row in errors[:SHOWN_ERRORS]:
        console.note(f"phisight: line {row['line']}: {row['error']}")
    if len(errors) > SHOWN_ERRORS:
        console.note(f"phisight: and {len(errors) - SHOWN_ERRORS} errors more, all in {summary['out']}")
    console.note(
        f"{summary['cases']} cases: {summary['answered']} answered ({summary['cut']} cut by the limit of tokens), "
        f"{summary['kept']} kept, {len(errors)} errors; "
        f"{summary['generated_tokens']} tokens in {summary['seconds']:.1f} s -> {summary['out']}"
    )
