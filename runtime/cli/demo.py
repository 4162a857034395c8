"""`phisight demo`: a model answers a question of each of the tasks, about pictures drawn for them."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

from phisight.answer import collect
from phisight.cli.album import Album
from phisight.cli.asking import StageBars, add_model_options, load_model
from phisight.cli.console import Console
from phisight.cli.exhibits import Exhibit, Outcome, check_room, hang, judge
from phisight.cli.half_blocks import Colours
from phisight.cli.terminal import choose_colours
from phisight.cli.transcript import Transcript
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.tasks import TASKS, sample

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """Six questions with known answers: one of each task of phisight eval. The pictures are drawn, saved as PNG
files and, in a terminal that can, shown. A file that another program wrote is never replaced.

An answer is right if it has the expected text in it, or if the centre of its box lies in the true box. A wrong answer
is no failure: the exit code is 0.

examples:
  phisight demo
  phisight demo --seed 7 --out pictures
  phisight demo --model phi4-int4 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=15, metavar="S", help="other pictures and questions (default: 15)")
    parser.add_argument("--model", default="demo", metavar="MODEL", help="an exported model directory (default: demo)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("phisight-demo"),
        metavar="DIR",
        help="where pictures are saved (default: phisight-demo in the current folder)",
    )
    parser.add_argument("--no-pictures", action="store_true", help="save the pictures, but do not show them")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="most tokens of thought and answer (default: 256)"
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    started = perf_counter()
    GenerateOptions(max_tokens=args.max_tokens)  # checks it before any work
    album = Album(args.out)
    samples = [sample(task, args.seed) for task in TASKS]
    check_room(album, samples)
    model = load_model(args)
    exhibits = hang(album, samples)
    options = model.options(temperature=0, max_tokens=args.max_tokens)
    if args.json:
        outcomes = _ask_in_silence(model, exhibits, options, album, console)
    else:
        transcript = Transcript(console, None if args.no_pictures else _colours(console))
        outcomes = _ask_aloud(model, exhibits, options, album, console, transcript)
    right, seconds = sum(outcome.verdict.right for outcome in outcomes), perf_counter() - started
    if args.json:
        document = {"model": args.model, "seed": args.seed, "out": str(args.out), "right": right, "seconds": seconds}
        console.document(document | {"questions": [outcome.as_json() for outcome in outcomes]})
        return 0
    console.line(f"{right} of {len(outcomes)} right, {seconds:.1f} s in all")
    console.line("\nwhat to type next:")
    for words in _next_commands(args, exhibits):
        console.line("  " + _command_line(words))
    return 0


def _ask_in_silence(
    model: Model, exhibits: Sequence[Exhibit], options: GenerateOptions, album: Album, console: Console
) -> list[Outcome]:
    outcomes = []
    with console.progress("demo", len(exhibits), " questions", scale=False) as bar:
        for exhibit in exhibits:
            answer = model.generate(exhibit.sample.question.text, exhibit.files, options=options)
            outcomes.append(judge(exhibit, answer, album))
            bar.add(1)
    return outcomes


def _ask_aloud(
    model: Model,
    exhibits: Sequence[Exhibit],
    options: GenerateOptions,
    album: Album,
    console: Console,
    transcript: Transcript,
) -> list[Outcome]:
    outcomes = []
    for number, exhibit in enumerate(exhibits, 1):
        transcript.begin(exhibit, number, len(exhibits))
        chunks = []
        with StageBars(console) as bars:
            for chunk in model.stream(exhibit.sample.question.text, exhibit.files, options=options, progress=bars.show):
                bars.close()
                transcript.show(chunk)
                chunks.append(chunk)
        outcomes.append(judge(exhibit, collect(chunks), album))
        transcript.end(outcomes[-1])
    return outcomes


def _colours(console: Console) -> Colours | None:
    """How standard output can show pictures; a terminal that cannot show them well is told why."""
    choice = choose_colours(sys.stdout, os.environ)
    if choice.colours is None and sys.stdout.isatty():
        console.note(f"phisight: note: the pictures are not shown: {choice.reason}")
    elif choice.colours == "mono":
        console.note(f"phisight: note: the pictures are shown without colours: {choice.reason}")
    return choice.colours


def _next_commands(args: argparse.Namespace, exhibits: Sequence[Exhibit]) -> Iterator[list[str]]:
    """Commands that go on from here, word by word."""
    model = [args.model] if args.mmproj is None else [args.model, "--mmproj", args.mmproj]
    shown = exhibits[0]
    images = [word for path in shown.files for word in ("--image", str(path))]
    yield ["phisight", "run", *model, shown.sample.question.text, *images, "--stats"]
    yield ["phisight", "chat", *model]
    yield ["phisight", "eval", *model]
    if args.model == "demo":
        yield ["phisight", "export", "demo", "demo-int4", "--decoder", "int4"]
        yield ["phisight", "demo", "--model", "demo-int4"]
    yield ["phisight", "demo", *(["--model", *model] if args.model != "demo" else []), "--seed", str(args.seed + 1)]


def _command_line(words: Sequence[str]) -> str:
    """Quoted as the system's shell wants it."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
