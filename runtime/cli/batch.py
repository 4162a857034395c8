"""`phisight batch`: a file of questions becomes a file of answers, and goes on where it was broken off."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO

from phisight.answer import collect
from phisight.cached_decoder import Cancel
from phisight.cli.asking import add_model_options, add_question_options, load_model, options_from
from phisight.cli.cases import BadCase, Case, read_cases
from phisight.cli.console import Console
from phisight.cli.interrupt import interrupt_as_event
from phisight.errors import InputError, PhisightError
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.prompt import Message, Mode, SystemBlock

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """A case is a line of JSON:
  {"id": "receipt-1", "prompt": "What is the total?", "image": "receipt.jpg"}
It has prompt, or messages with {"type": "image"} parts; image or images, relative to the cases file; and if it shall
differ from the options given here: mode, system, max_patches, max_tokens, temperature, top_p, top_k, min_p,
repetition_penalty, seed, stop, thinking_budget.

OUT gets a row for each case, in order: line, id, case, then text, thought, finish_reason, notes and stats, or error.
The same command goes on behind the rows that are there. "case" is a digest of the case, the options and the model:
where it differs, nothing is written and the exit code is 2. What a picture's file holds is not in it. A row with an
error is not tried again.

Exit codes: 0 all answered, 1 a row has an error, 2 nothing could be done, 130 interrupted.

examples:
  phisight batch demo cases.jsonl --out answers.jsonl
  phisight batch phi4-int4 cases.jsonl --out answers.jsonl --max-patches 1024 --mode nothink --temperature 0"""


@dataclass(frozen=True)
class Settings:
    """What the command line says about every question."""

    options: GenerateOptions
    mode: Mode
    system: str | None
    max_patches: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an exported model directory, or demo")
    parser.add_argument("cases", metavar="CASES", type=Path, help="the questions, one JSON object a line")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="the answers, one JSON object a line")
    parser.add_argument("--force", action="store_true", help="write OUT anew")
    add_question_options(parser)
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="a summary as one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    cases = read_cases(args.cases)
    if args.out.exists() and args.out.samefile(args.cases):
        raise InputError(f"{args.out} holds the cases: give another --out")
    model = load_model(args)
    settings = Settings(options_from(args, model), args.mode, args.system, args.max_patches)
    digests = _digests(cases, settings, model)
    started = perf_counter()
    with _open_rows(args.out) as out:
        if args.force:
            out.truncate(0)
        rows = _kept_rows(out, args.out, cases, digests)
        kept = len(rows)
        with console.progress("cases", len(cases) - kept, " cases") as bar, interrupt_as_event() as stop:
            for case, digest in list(zip(cases, digests, strict=True))[kept:]:
                answer = _answer(model, case, settings, stop.is_set)
                if answer is None:
                    break
                rows.append({"line": case.line, "id": case.id, "case": digest, **answer})
                out.write(json.dumps(rows[-1]).encode() + b"\n")
                out.flush()
                bar.add(1)
    return _report(rows, kept, len(cases), perf_counter() - started, args.out, console)


def _answer(model: Model, case: Case | BadCase, settings: Settings, cancel: Cancel) -> dict[str, Any] | None:
    """The part of a row that the model makes; None if it was cancelled."""
    if cancel():
        return None
    if isinstance(case, BadCase):
        return {"error": case.problem}
    messages, system_block = _with_system(case, settings.system)
    mode = case.mode or settings.mode
    try:
        prompt = model.prompt(messages, len(case.images), mode=mode, system_block=system_block)
        chunks = model.stream(
            messages,
            case.images,
            mode=mode,
            options=replace(settings.options, **case.options),
            system_block=system_block,
            max_patches=case.max_patches or settings.max_patches,
            cancel=cancel,
        )
        answer = collect(chunks, prompt.notes)
    except PhisightError as error:
        return {"error": " ".join(str(error).split())}
    if answer.finish_reason == "cancelled":
        return None
    return {
        "text": answer.text,
        "thought": answer.thought,
        "finish_reason": answer.finish_reason,
        "notes": answer.notes,
        "stats": answer.stats.as_json(),
    }


def _with_system(case: Case, default: str | None) -> tuple[Sequence[Message], SystemBlock]:
    """The messages, and whether the template's own system block stays."""
    system = default if case.system is None else case.system
    if system == "none":
        return case.messages, "none"
    if system is None or any(isinstance(m, dict) and m.get("role") == "system" for m in case.messages):
        return case.messages, "keep"
    return [{"role": "system", "content": system}, *case.messages], "keep"


def _digests(cases: Sequence[Case | BadCase], settings: Settings, model: Model) -> list[str]:
    """What each answer depends on, in 16 digits."""
    files = {name: entry.sha256 for name, entry in model.manifest.files.items()}
    common = json.dumps([asdict(settings), files], sort_keys=True)
    return [
        hashlib.sha256(json.dumps([case.source, common], sort_keys=True).encode()).hexdigest()[:16] for case in cases
    ]


def _open_rows(path: Path) -> BinaryIO:
    try:
        return path.open("a+b")
    except OSError as error:
        raise InputError(f"{path}: the answers cannot be written: {error.strerror or error}") from error


def _kept_rows(
    out: BinaryIO, path: Path, cases: Sequence[Case | BadCase], digests: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows that are there, which must be those of the first cases. A last one without its end is taken away.

    Raises InputError, and changes nothing, for a file that is not of these cases.
    """
    out.seek(0)
    *lines, tail = out.read().split(b"\n")
    rows: list[dict[str, Any]] = []
    way_out = "give another --out, or --force to write it anew"
    for number, line in enumerate(lines):
        if number == len(cases):
            raise InputError(f"{path} has {len(lines)} rows for {len(cases)} cases: {way_out}")
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"line", "id", "case"} <= row.keys():
            raise InputError(f"{path}: line {number + 1} is not a row of answers: {way_out}")
        if (row["line"], row["case"]) != (cases[number].line, digests[number]):
            raise InputError(
                f"{path}: row {number + 1} was made from another case, with other options or by another model than "
                f"line {cases[number].line} of the cases would be now: {way_out}"
            )
        rows.append(row)
    if tail:
        begin = b"" if len(rows) == len(cases) else b'{"line": %d,' % cases[len(rows)].line
        if not begin or not (tail.startswith(begin) or begin.startswith(tail)):
            raise InputError(f"{path}: its end is not a row of answers: {way_out}")
        out.truncate(sum(len(line) + 1 for line in lines))
    return rows


def _report(rows: Sequence[dict[str, Any]], kept: int, cases: int, seconds: float, path: Path, console: Console) -> int:
    failed = [row for row in rows if "error" in row]
    tokens = sum(row["stats"]["generated_tokens"] for row in rows[kept:] if "error" not in row)
    console.note(
        f"{path}: {len(rows)} of {cases} cases, {len(failed)} with an error, {kept} done before; "
        f"{tokens} tokens in {seconds:.1f} s"
    )
    if failed:
        console.note(f"phisight: note: the first error, of case {failed[0]['id']}: {failed[0]['error']}")
    if console.as_json:
        console.document(
            {
                "out": str(path),
                "cases": cases,
                "answered": len(rows) - len(failed),
                "errors": len(failed),
                "kept": kept,
                "generated_tokens": tokens,
                "seconds": seconds,
            }
        )
    if len(rows) < cases:
        console.note("phisight: interrupted: the same command goes on from here")
        return 130
    return 1 if failed else 0
