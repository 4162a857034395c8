"""`phisight chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args

from phisight.answer import Chunk, Stats
from phisight.cli.asking import (
    StageBars,
    add_model_options,
    add_question_options,
    check_request,
    load_model,
    note_limit,
    options_from,
    show,
)
from phisight.cli.budget import note_budget
from phisight.cli.console import Console
from phisight.cli.interrupt import interrupt_as_event
from phisight.conversation import Conversation
from phisight.errors import InputError, PhisightError
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.prompt import Mode

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  phisight chat demo
  phisight chat phi4-int4 --system "Answer in French." --max-patches 1024

Ctrl-C stops an answer; at the prompt it leaves, as do Ctrl-D and /quit."""

HELP = """/image FILE...  pictures for the next question
/mode MODE      auto, think or nothink
/stats          counts and times of the last answer
/reset          forget the conversation
/quit           leave"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an exported model directory, or demo")
    add_question_options(parser)
    add_model_options(parser)
    parser.add_argument("--stats", action="store_true", help="show counts and stage times after each answer")


def run(args: argparse.Namespace, console: Console) -> int:
    check_request(args)
    model = load_model(args)
    note_budget(args, console)
    chat = Chat(args, model, console)
    for note in model.notes:
        console.note(f"phisight: note: {note}")
    console.note("Ask, or type /help.")
    with suppress(ImportError):  # line editing and history, where the system has it
        importlib.import_module("readline")
    while True:
        try:
            line = _read_line()
        except (EOFError, KeyboardInterrupt):
            console.note("")
            return 0
        try:
            if not chat.take(line.strip()):
                return 0
        except PhisightError as error:
            console.note(f"phisight: error: {error}")


class Chat:
    """The state of the loop: the conversation, the mode, pictures that wait for the next question."""

    def __init__(self, args: argparse.Namespace, model: Model, console: Console) -> None:
        self._console = console
        self._options: GenerateOptions = options_from(args, model)
        self._mode: Mode = args.mode
        self._show_stats: bool = args.stats
        self._stats: Stats | None = None
        self._waiting: list[str] = []
        self._conversation = Conversation(
            model,
            system=None if args.system == "none" else args.system,
            system_block="none" if args.system == "none" else "keep",
            max_patches=args.max_patches,
        )

    def take(self, line: str) -> bool:
        """One line of input; False ends the loop. Raises PhisightError."""
        if not line:
            return True
        if not line.startswith("/"):
            self._ask(line)
            return True
        word, _, rest = line.partition(" ")
        match word:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._console.note(HELP)
            case "/reset":
                self._conversation.reset()
                self._waiting.clear()
                self._console.note("the conversation is forgotten")
            case "/image":
                self._add_images(rest)
            case "/mode":
                self._set_mode(rest.strip())
            case "/stats":
                self._console.note("no answer yet" if self._stats is None else "\n".join(self._stats.lines()))
            case _:
                raise InputError(f"{word} is no command: /help shows them; a question must not begin with /")
        return True

    def _ask(self, text: str) -> None:
        last, answered = Chunk(""), False
        with interrupt_as_event() as stop, StageBars(self._console) as bars:
            for chunk in self._conversation.ask(
                text, self._waiting, mode=self._mode, options=self._options, cancel=stop.is_set, progress=bars.show
            ):
                bars.close()
                show(chunk, last, self._console)
                last, answered = chunk, answered or (chunk.channel == "answer" and bool(chunk.text))
        self._waiting = []
        self._stats = last.stats
        self._console.line(" [stopped]" if last.finish_reason == "cancelled" else "")
        note_limit(answered, last.finish_reason, self._console, self._options.constraint)
        if self._show_stats and self._stats is not None:
            self._console.note("\n".join(self._stats.lines()))

    def _add_images(self, names: str) -> None:
        files = _split(names)
        if not files:
            raise InputError("/image needs a file: /image photo.jpg")
        for name in files:
            if not Path(name).is_file():
                raise InputError(f"{name} does not exist: check the path of the image")
        self._waiting += files
        self._console.note(f"pictures for the next question: {len(self._waiting)}")

    def _set_mode(self, mode: str) -> None:
        for known in get_args(Mode):
            if mode == known:
                self._mode = known
                self._console.note(f"mode {mode}")
                return
        raise InputError(f"mode is {mode!r}, wanted {', '.join(get_args(Mode))}")


def _split(names: str) -> list[str]:
    """File names as in a shell; one that exists as it stands may hold spaces."""
    if Path(names.strip()).is_file():
        return [names.strip()]
    try:
        # A backslash is a part of names on Windows.
        return [name.strip("\"'") for name in shlex.split(names, posix=sys.platform != "win32")]
    except ValueError as error:
        raise InputError(f"{names} cannot be split into file names: {error}") from None


def _read_line() -> str:
    """A line from the terminal, or from a pipe without a prompt."""
    return input("> " if sys.stdin.isatty() else "")
