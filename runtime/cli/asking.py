"""What the commands that ask a model have in common: options, loading, progress."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, get_args

from phisight.answer import Chunk
from phisight.cli.budget import add_patch_options, check_budget, settle
from phisight.cli.cache import add_cache_options, use_cache
from phisight.cli.console import Console, ProgressBar
from phisight.cli.engine_choice import chosen_device
from phisight.constraint import Constraint
from phisight.constraint_llguidance import check_constraint
from phisight.devices import DeviceChoice, DeviceRequest
from phisight.errors import ImageError, InputError
from phisight.generate import FinishReason
from phisight.loading import load
from phisight.model import Model
from phisight.options import GenerateOptions
from phisight.prompt import Message, SystemBlock
from phisight.text_file import read_text_file
from phisight.threads import read_threads

__all__ = [
    "SAMPLING",
    "StageBars",
    "add_device_option",
    "add_length_options",
    "add_model_options",
    "add_prompt_options",
    "add_question_options",
    "check_request",
    "constraint_from",
    "load_model",
    "note_limit",
    "options_from",
    "show",
    "system_messages",
]

SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "thinking_budget",
)
"""Fields of GenerateOptions that have an option of their own."""


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """How a question is put and its answer drawn."""
    add_prompt_options(parser)
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, metavar="P", help="share of probability that is kept")
    parser.add_argument("--top-k", type=int, metavar="K", help="number of tokens that are kept")
    parser.add_argument("--min-p", type=float, metavar="P", help="least share of the likeliest token's probability")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids repetition")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same answer")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="text that ends the answer; may be given again")
    form = parser.add_argument_group(
        "form of the answer", 'in force once the thought has ended; needs pip install "phisight[schema]"'
    ).add_mutually_exclusive_group()
    form.add_argument("--schema", type=Path, metavar="FILE", help="JSON that fits this JSON schema")
    form.add_argument("--json-object", action="store_true", help="any JSON object")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="text of this grammar (llguidance's Lark)")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """How a question is put, and how long its answer may be."""
    parser.add_argument("--system", metavar="TEXT", help="a system message; none leaves out the template's own")
    add_length_options(parser)


def add_length_options(parser: argparse.ArgumentParser) -> None:
    """Whether to think, and how long prompt and answer may be."""
    parser.add_argument(
        "--mode",
        choices=["auto", "think", "nothink"],
        default="auto",
        help="force a thought or a direct answer (default: the model's own choice)",
    )
    add_patch_options(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of thought and answer together")
    parser.add_argument("--thinking-budget", type=int, metavar="N", help="most tokens of thought")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How the model is opened."""
    parser.add_argument("--threads", default="auto", metavar="N", help="threads, or auto (default)")
    add_device_option(parser)
    parser.add_argument("--context", type=int, metavar="N", help="most positions of prompt and answer together")
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=[0, 4],
        help="ONNX: override the export; 0 computes quantised layers in floats",
    )
    add_kv_option(parser)
    parser.add_argument(
        "--image-attention",
        choices=["causal", "bidirectional"],
        help="whether the tokens of an image see each other; ONNX must be exported for it (default: as exported)",
    )
    parser.add_argument(
        "--prompt-lookup",
        action=argparse.BooleanOptionalAction,
        help="guess tokens that prompt and answer hold already, and run several at once (default: off)",
    )
    add_cache_options(parser)
    gguf = parser.add_argument_group("GGUF models")
    gguf.add_argument("--mmproj", metavar="FILE", help="the vision tower of a GGUF file")
    gguf.add_argument(
        "--vision-engine",
        choices=["auto", "onnx", "mtmd"],
        default="auto",
        help="run the tower with ONNX Runtime, or with llama.cpp (default: ONNX where it is there)",
    )
    gguf.add_argument("--gpu-layers", type=int, default=0, metavar="N", help="decoder layers on a GPU (default: 0)")
    gguf.add_argument(
        "--repack",
        action=argparse.BooleanOptionalAction,
        help="keep a second, repacked copy of the weights (default: where it is faster)",
    )
    gguf.add_argument("--verbose", action="store_true", help="show llama.cpp's log")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Where ONNX models run; checked where a model is opened."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help=f"of ONNX models: {', '.join(get_args(DeviceRequest))} (default: auto)",
    )


def add_kv_option(parser: argparse.ArgumentParser) -> None:
    """The KV cache's type; int8 and q8_0 are two names of one."""
    parser.add_argument(
        "--kv",
        type=lambda name: {"q8_0": "int8"}.get(name, name),
        choices=["f32", "f16", "int8"],
        help="type of the KV cache: int8, also called q8_0, for GGUF and for ONNX exported with --kv int8; "
        "f16 (GGUF's default), f32 (ONNX's, unless exported with --float f16)",
    )


def load_model(args: argparse.Namespace, directory: Path | None = None) -> Model:
    """The model of the command line, or that of a directory made of it. Raises InputError, EngineError."""
    path = directory or args.model
    device = chosen_device(args, path)
    args.device = device.name if isinstance(device, DeviceChoice) else device  # what is kept on disk is that engine's
    model = load(
        path,
        device=device,
        threads=read_threads(args.threads),
        context=args.context,
        accuracy_level=args.accuracy_level,
        image_attention=args.image_attention,
        mmproj=args.mmproj,
        vision_engine=args.vision_engine,
        gpu_layers=args.gpu_layers,
        kv_type=args.kv,
        repack=args.repack,
        verbose=args.verbose,
    )
    model.prompt_lookup = args.prompt_lookup is True
    settle(args, model, path)  # before pictures are kept on disk: it encodes some of its own
    use_cache(args, model, path)
    return model


def options_from(args: argparse.Namespace, model: Model) -> GenerateOptions:
    """The model's defaults with what the user said. Raises InputError."""
    return model.options(**_changes(args))


def constraint_from(args: argparse.Namespace) -> Constraint | None:
    """The form of the answer, if the command has options for one. Raises InputError."""
    if (path := getattr(args, "schema", None)) is not None:
        try:
            return Constraint.json_schema(read_text_file(path))
        except InputError as error:
            raise InputError(f"--schema {path}: {error}") from None
    if getattr(args, "json_object", False):
        return Constraint.json_object()
    if (path := getattr(args, "grammar", None)) is not None:
        return Constraint.grammar(read_text_file(path))
    return None


def check_request(args: argparse.Namespace, images: Sequence[str] = ()) -> None:
    """What can be told before a large model is opened: options out of range, pictures that are not there.

    Raises InputError, ImageError, and EngineError for a form of the answer without llguidance.
    """
    if (constraint := GenerateOptions(**_changes(args)).constraint) is not None:
        check_constraint(constraint)
    check_budget(args)
    for name in images:
        if not Path(name).exists():
            raise ImageError(f"{name} does not exist: check the path of the image")


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """What was said of SAMPLING; a command need not have all of its options."""
    changes = {name: value for name in SAMPLING if (value := getattr(args, name, None)) is not None}
    if "stop" in changes:
        changes["stop"] = tuple(changes["stop"])
    return changes | {"constraint": constraint_from(args)}


def system_messages(system: str | None) -> tuple[list[Message], SystemBlock]:
    """What --system means: messages to put first, and what becomes of the template's own system block."""
    if system is None or system == "none":
        return [], "keep" if system is None else "none"
    return [{"role": "system", "content": system}], "keep"


def show(chunk: Chunk, before: Chunk, console: Console) -> None:
    """The answer on one stream, the thought on the other, on lines of their own."""
    if before.channel == "thought" and before.text and (chunk.channel == "answer" or chunk.finish_reason):
        console.aside("\n")
    if chunk.channel == "answer":
        console.write(chunk.text)
    else:
        console.aside(chunk.text)


def note_limit(
    answered: bool, reason: FinishReason | None, console: Console, constraint: Constraint | None = None
) -> None:
    """Say that an answer was cut by the limit of tokens, and where."""
    if reason == "length":
        end = "its end" if constraint is None or constraint.kind != "json" else "its end: the JSON is incomplete"
        what = f"before {end}" if answered else "in the middle of its thought, without an answer"
        console.note(
            f"phisight: note: the answer reached the limit of tokens {what}; raise --max-tokens, "
            "or the context if that is full"
        )


class StageBars:
    """A progress bar for each stage before the first token."""

    UNITS: ClassVar = {"encode": " images", "prefill": " tokens"}

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ExitStack()
        self._stage: str | None = None
        self._bar: ProgressBar | None = None

    def __enter__(self) -> StageBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, stage: Literal["encode", "prefill"], done: int, total: int) -> None:
        """Where the stage is; a new stage takes the place of the one before."""
        if stage != self._stage:
            self.close()
            self._stage = stage
            progress = self._console.progress(stage, total, self.UNITS[stage], scale=False)
            self._bar = self._open.enter_context(progress)
        if self._bar is not None:
            self._bar.set(done, total)

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()
        self._stage = self._bar = None
