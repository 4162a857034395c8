"""`phisight run`: one question, about pictures or not; the answer streams to standard output."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from phisight.answer import Chunk, collect
from phisight.cli.asking import (
    StageBars,
    add_model_options,
    add_question_options,
    check_request,
    load_model,
    note_limit,
    options_from,
    show,
    system_messages,
)
from phisight.cli.budget import note_budget, told_budget
from phisight.cli.console import Console
from phisight.errors import InputError
from phisight.prompt import user_message

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """The answer goes to standard output as it comes, the thought and everything else to standard error.

examples:
  phisight run demo "What does the text say?" --image picture.png
  phisight run phi4-int4 "What changed?" --image before.jpg --image after.jpg --mode think --stats
  phisight run phi4-int4 "Summarise." --image page.png --max-patches 1024 --json
  phisight run phi4-int4 "Summarise." --image page.png --max-patches auto --ttft 20s
  phisight run phi4-int4 "What was bought?" --image receipt.jpg --schema receipt.schema.json > receipt.json
  phisight run phi4-int4 - < question.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an exported model directory, or demo")
    parser.add_argument("prompt", metavar="PROMPT", help="the question; - reads it from standard input")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given again")
    add_question_options(parser)
    add_model_options(parser)
    parser.add_argument("--stats", action="store_true", help="show counts, stage times and choices")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    text = _standard_input() if args.prompt == "-" else args.prompt
    opening, system_block = system_messages(args.system)
    messages = [*opening, user_message(text, len(args.image))]
    check_request(args, args.image)
    model = load_model(args)
    options = options_from(args, model)
    note_budget(args, console)
    prompt = model.prompt(messages, len(args.image), mode=args.mode, system_block=system_block)
    for note in (*model.notes, *prompt.notes) if args.stats else prompt.notes:
        console.note(f"phisight: note: {note}")
    chunks: list[Chunk] = []
    with StageBars(console) as bars:
        stream = model.stream_prompt(prompt, args.image, options, max_patches=args.max_patches, progress=bars.show)
        for chunk in stream:
            bars.close()
            if not args.json:
                show(chunk, chunks[-1] if chunks else chunk, console)
            chunks.append(chunk)
    answer = collect(chunks, prompt.notes)
    if args.json:
        document: dict[str, Any] = {
            "model": args.model,
            "text": answer.text,
            "thought": answer.thought,
            "finish_reason": answer.finish_reason,
            "stats": answer.stats.as_json(),
            "notes": [*model.notes, *answer.notes],
            **told_budget(args),
        }
        console.document(document)
    else:
        console.line()
    note_limit(bool(answer.text), answer.finish_reason, console, options.constraint)
    if args.stats:
        for line in answer.stats.lines():
            console.note(line)
    return 0


def _standard_input() -> str:
    """The question, without the line end that a file or `echo` puts behind it."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not {error.encoding}: give a text in this encoding") from None
