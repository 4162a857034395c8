"""`phisight plan`: what each variant of a model takes on a machine, before anything is downloaded or exported."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phisight.bench import measure_bounds
from phisight.chat_template import read_chat_template
from phisight.cli.budget import read_seconds
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.cli.plan_tables import check_lines, check_rows, plan_lines
from phisight.cli.probing import measure_rates
from phisight.config import ModelConfig
from phisight.context import check_context
from phisight.errors import EngineError, InputError
from phisight.loading import checkpoint_directory, is_checkpoint, model_directory
from phisight.manifest import Manifest
from phisight.planner import (
    Machine,
    Rates,
    Variant,
    Workload,
    choose_patches,
    decode_seconds,
    encode_seconds,
    first_token_seconds,
    gpu_share,
    judge,
    memory_bytes,
    predict_memory,
    prefill_seconds,
    read_bytes,
    step_seconds,
)
from phisight.planner.check import Measured, measure_model
from phisight.prompt import PromptBuilder, user_message
from phisight.threads import choose_threads, read_threads
from phisight.tokenizer import Tokenizer

if TYPE_CHECKING:
    from phisight.export.gguf_plan import GgufOptions
    from phisight.export.plan import ExportOptions

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """Nothing is downloaded or exported: 15b is the configuration of microsoft/Phi-4-reasoning-vision-15B. Sizes
of files are exact. Memory is reckoned from what each engine keeps of the weights. Times follow from the work of each
stage and from rates that are measured now, in about 20 seconds, on small models of the same kinds of weights.

A MODEL that is exported already is planned alone; with --check it is then opened and asked about a picture, and the
predictions stand beside what was measured.

examples:
  phisight plan
  phisight plan --memory 16GB --vram 8GB --ttft 20s
  phisight plan --memory 16GB --kv int8
  phisight plan path/to/checkpoint --images 2 --max-patches 1024
  phisight plan --json > plan.json
  phisight plan --rates plan.json --images 4
  phisight plan demo --check"""

REAL = "15b"
TEXT_POSITIONS = 443
"""The template's own system block, 411 tokens of the 15B model, and a question."""
ANSWER_POSITIONS = 1024
QUESTION = "What is written in the picture, and what does it mean for the reader?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="CHECKPOINT|MODEL|15b",
        nargs="?",
        default=REAL,
        help="a checkpoint directory, an exported model, demo, or 15b (default), which needs no file",
    )
    parser.add_argument("--memory", metavar="SIZE", help="memory to plan for, such as 16GB (default: this machine's)")
    parser.add_argument("--vram", metavar="SIZE", help="memory of a GPU, for the layers of GGUF models")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="pictures of a question (default: 1)")
    parser.add_argument("--max-patches", type=int, metavar="N", help="patches per picture (default: the model's most)")
    parser.add_argument(
        "--context", type=int, metavar="N", help=f"positions kept (default: the prompt and {ANSWER_POSITIONS})"
    )
    parser.add_argument(
        "--kv", choices=["int8"], help="plan for a KV cache in INT8: memory alone, times stay those of a float one"
    )
    parser.add_argument("--ttft", metavar="S", help="tell the patches whose first token comes within, such as 20s")
    parser.add_argument("--threads", default="auto", metavar="N", help="threads, or auto (default)")
    parser.add_argument(
        "--rates", type=Path, metavar="FILE", help="rates of an earlier plan --json, measured nowhere new"
    )
    parser.add_argument("--check", action="store_true", help="open the MODEL and compare the plan with what it takes")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


@dataclass(frozen=True)
class Target:
    """What is planned: a configuration, its variants with their options, positions of text and where that is from."""

    config: ModelConfig
    variants: Callable[[], Sequence[tuple[Variant, ExportOptions | GgufOptions]]]
    text: int
    text_source: str
    directory: Path | None = None


def run(args: argparse.Namespace, console: Console) -> int:
    memory = None if args.memory is None else read_bytes("--memory", args.memory)
    vram = None if args.vram is None else read_bytes("--vram", args.vram)
    ttft = None if args.ttft is None else read_seconds("--ttft", args.ttft)
    threads = choose_threads(read_threads(args.threads)).count
    rates = None if args.rates is None else Rates.read(args.rates)
    target = _target(args)
    if args.check and target.directory is None:
        raise InputError(f"--check opens a model, but {args.model} is not exported: name a model directory, or demo")
    work = _workload(args, target)
    if args.check and args.kv is not None:
        raise InputError("--check measures a float KV cache: leave --kv out, or --check")
    variants = target.variants()
    machine = _machine(memory, threads, measured=rates is None)
    if rates is None:
        rates = measure_rates(target.config, [options for _, options in variants], threads, console)
    rows = [_row(variant, work, rates, machine, vram, ttft) for variant, _ in variants]
    document: dict[str, Any] = {
        "model": str(args.model),
        "machine": _machine_document(machine, threads),
        "asked": {"images": work.images, "patches": work.patches, "text": work.text, "context": work.context},
        "text_source": target.text_source,
        "kv": args.kv,
        "vram": vram,
        "ttft": ttft,
        "rates": rates.as_json(),
        "variants": rows,
    }
    if args.check and target.directory is not None:
        measured = _measured(target.directory, work, threads, console)
        again = (
            rates
            if args.rates
            else measure_rates(target.config, [options for _, options in variants], threads, console)
        )
        document["check"] = check_rows(variants[0][0], rates.between(again), work, measured)
        document["drift"] = rates.drift(again)
    if args.json:
        console.document(document)
        return 0
    for line in plan_lines(document):
        console.line(line)
    for line in check_lines(document["check"], document["drift"]) if args.check else ():
        console.line(line)
    return 0


def _target(args: argparse.Namespace) -> Target:
    """Raises InputError, ModelDirError, CheckpointError."""
    with needs_extra("export"):
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.file_sizes import imagined_checkpoint
        from phisight.export.variants import all_variants, model_variant, real_model
    if args.model == REAL:
        config = real_model()
        variants = partial(all_variants, imagined_checkpoint(config), "CHECKPOINT", args.kv)
        return Target(config, variants, TEXT_POSITIONS, "assumed")
    directory = model_directory(args.model)
    if directory.is_file():
        raise InputError(f"{directory} is a file: plan the checkpoint that it was made of, or a model directory")
    if is_checkpoint(directory):
        checkpoint = Checkpoint.open(checkpoint_directory(args.model))
        text = _text_positions(checkpoint.directory)
        return Target(checkpoint.config, partial(all_variants, checkpoint, args.model, args.kv), text, "counted")
    manifest = Manifest.read(directory)
    variant = model_variant(manifest, args.model, args.kv)
    return Target(manifest.model, lambda: [variant], _text_positions(directory), "counted", directory)


def _text_positions(directory: Path) -> int:
    """Of a question with what the template puts around it."""
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    return len(PromptBuilder(tokenizer, read_chat_template(directory)).build([user_message(QUESTION)]).ids)


def _workload(args: argparse.Namespace, target: Target) -> Workload:
    """Raises InputError, PromptError."""
    budget, most = target.config.images, target.config.decoder.context_length
    if args.images < 0:
        raise InputError(f"--images is {args.images}, wanted 0 or more")
    images = args.images if budget is not None else 0
    if budget is None and (args.max_patches is not None or args.images > 1):
        raise InputError(f"{args.model} is text only: leave --images and --max-patches out")
    patches = 0
    if budget is not None:
        patches = budget.max_patches if args.max_patches is None else args.max_patches
        if not 1 <= patches <= budget.max_patches:
            raise InputError(f"--max-patches is {patches}, wanted 1 to {budget.max_patches}")
    prompt = target.text + images * patches
    check_context(target.text, images * patches, most)
    context = min(prompt + ANSWER_POSITIONS, most) if args.context is None else args.context
    if not prompt < context <= most:
        raise InputError(f"--context is {context} positions, wanted more than the prompt's {prompt} and at most {most}")
    return Workload(target.text, images, patches, context)


def _machine(memory: int | None, threads: int, *, measured: bool) -> Machine:
    bounds = None
    if measured:
        try:
            bounds = measure_bounds(threads)
        except EngineError:  # without ONNX Runtime nothing multiplies INT8 here; rates say what they can
            bounds = None
    if memory is not None:
        return Machine(memory, "as said", bounds)
    return Machine(memory_bytes(), "this machine's", bounds)


def _machine_document(machine: Machine, threads: int) -> dict[str, Any]:
    bounds = machine.bounds
    return {
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "threads": threads,
        "memory": machine.memory,
        "memory_source": machine.memory_source,
        "read_bytes_per_second": None if bounds is None else bounds.read_rate,
        "integer_operations_per_second": None if bounds is None else bounds.product_rate,
    }


def _row(
    variant: Variant, work: Workload, rates: Rates, machine: Machine, vram: int | None, ttft: float | None
) -> dict[str, Any]:
    memory = predict_memory(variant, work)
    verdict = judge(memory, machine.memory)
    share = None if vram is None else gpu_share(variant, work, vram)
    row: dict[str, Any] = {
        "name": variant.name,
        "file_bytes": variant.file_bytes,
        "memory": memory.as_json(),
        "fits": verdict.fits,
        "reason": verdict.reason,
        "gpu": None if share is None else {"layers": share.layers, "of": share.of, "bytes": share.bytes},
        "command": variant.command,
    }
    return row | _times(variant, work, rates, ttft)


def _times(variant: Variant, work: Workload, rates: Rates, ttft: float | None) -> dict[str, Any]:
    """None where nothing was measured that they could follow from."""
    names = ("encode_s", "prefill_s", "first_token_s", "tokens_per_second", "patches_within_ttft")
    row: dict[str, Any] = dict.fromkeys(names)
    config, decoder = variant.config, rates.decoders.get(variant.decoder)
    if decoder is None or (work.images and variant.tower not in rates.towers):
        return row
    if work.images:
        row["encode_s"] = encode_seconds(config, rates.towers[variant.tower], work.patches)
    row["prefill_s"] = prefill_seconds(config, decoder, work.prompt, step_seconds(variant, rates))

    def first_token(patches: int) -> float:
        return first_token_seconds(variant, rates, replace(work, patches=patches))

    row["first_token_s"] = first_token(work.patches)
    row["tokens_per_second"] = 1 / decode_seconds(variant, rates, work.prompt)
    if ttft is not None and work.images and config.images is not None:
        try:
            budget = config.images
            row["patches_within_ttft"] = choose_patches(
                first_token, budget.min_patches, budget.max_patches, ttft
            ).patches
        except InputError:  # not even the fewest
            row["patches_within_ttft"] = 0
    return row


def _measured(directory: Path, work: Workload, threads: int, console: Console) -> Measured:
    with console.progress("opening and asking", 2, " steps", scale=False) as bar:
        return measure_model(directory, threads, work.images, work.patches, lambda what: bar.add(1))
