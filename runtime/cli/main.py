"""`phisight`: finds the command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 something failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import NoReturn

from phisight.cli.console import Console, OutputError
from phisight.errors import PhisightError

__all__ = ["main"]


@dataclass(frozen=True)
class Command:
    """A command: the module with its `add_arguments(parser)` and `run(args, console) -> int`, and its purpose."""

    module: str
    purpose: str


COMMANDS = {
    "run": Command("phisight.cli.run", "answer one question, about pictures or not"),
    "chat": Command("phisight.cli.chat", "talk with a model in the terminal"),
    "ground": Command("phisight.cli.ground", "find a control in a picture, in its pixels"),
    "demo": Command("phisight.cli.demo", "ask the built-in model about pictures drawn for it"),
    "eval": Command("phisight.cli.eval", "ask questions whose answers are known, and count the right ones"),
    "compare": Command("phisight.cli.compare", "measure what each quantisation costs and buys"),
    "bench": Command("phisight.cli.bench", "time each stage, beside another engine on the same weights"),
    "plan": Command("phisight.cli.plan", "tell what each variant of a model takes on a machine"),
    "batch": Command("phisight.cli.batch", "answer a file of questions, resuming where it stopped"),
    "serve": Command("phisight.cli.serve", "serve a model to programs over the network"),
    "tokens": Command("phisight.cli.tokens", "how many tokens a picture costs"),
    "resize": Command("phisight.cli.resize", "write a picture as the model sees it"),
    "export": Command("phisight.cli.export", "make a model directory from a checkpoint"),
    "imatrix": Command("phisight.cli.imatrix", "measure how much each column of a checkpoint's weights matters"),
    "cache": Command("phisight.cli.cache", "what models keep on disk to save work, and how to remove it"),
    "info": Command("phisight.cli.info", "describe a model directory or a checkpoint"),
    "verify": Command("phisight.cli.verify", "check the files of a model directory"),
    "synth": Command("phisight.cli.synth", "write a synthetic checkpoint, for trying things out"),
}

OVERVIEW = """examples:
  phisight run demo "What does the text say?" --image picture.png
  phisight export path/to/checkpoint out --decoder int4
  phisight run out "Describe this image." --image photo.jpg --stats
  phisight run --help"""


class Parser(argparse.ArgumentParser):
    """Bad arguments are one line and exit code 2, as all bad input is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"phisight: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    console = Console()
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments), console)
    except OutputError as error:
        error.release()
        if not error.reader_gone:
            with suppress(OutputError):
                console.note(f"phisight: error: {error}")
        return 1


def _run(arguments: list[str], console: Console) -> int:
    debug = False
    try:
        args, module = _parse(arguments)
        debug = args.debug
        console.as_json = getattr(args, "json", False)
        code: int = module.run(args, console)
        return code
    except SystemExit as exit_:  # help, the version, or what is wrong with the arguments
        console.write("")
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        console.end_lines()
        console.note("phisight: interrupted")
        return 130
    except OutputError:
        raise
    except PhisightError as error:
        return _report(error, str(error), error.exit_code, debug, console)
    except Exception as error:
        said = f"unexpected {type(error).__name__}" + (f": {error}" if str(error) else "")
        return _report(error, said, 1, debug, console)


def _report(error: Exception, said: str, code: int, debug: bool, console: Console) -> int:
    console.end_lines()
    if debug:
        traceback.print_exception(error)
    console.note(f"phisight: error: {' '.join(said.split())}")
    return code


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, ModuleType]:
    """The arguments and the command's module, the only one that is imported."""
    parser = Parser(
        prog="phisight",
        description="Run Phi-4-reasoning-vision on your own machine.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phisight {version('phisight')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    module = importlib.import_module(COMMANDS[chosen].module) if chosen in COMMANDS else sys.modules[__name__]
    for name, command in COMMANDS.items():
        epilog = module.EXAMPLES if name == chosen else None
        sub = commands.add_parser(
            name,
            help=command.purpose,
            description=command.purpose.capitalize() + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            module.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser.parse_args(arguments), module


if __name__ == "__main__":
    sys.exit(main())
