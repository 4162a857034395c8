"""`phisight export`: a checkpoint becomes a model directory. The plan is shown before any work starts."""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phisight.cli.calibrating import (
    CALIBRATION_HELP,
    CALIBRATION_OPTIONS,
    add_calibration_options,
    read_data,
    work_directory,
)
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.cli.mixed import MIXED_HELP, Mixed, add_mixed_options, is_mixed, mix, plan_place
from phisight.cli.quantizing import quantize, weighed_plan
from phisight.cli.tables import describe_plan
from phisight.errors import InputError
from phisight.loading import checkpoint_directory

if TYPE_CHECKING:
    from phisight.export.checkpoint import Checkpoint
    from phisight.export.gguf_plan import GgufOptions, GgufPlan
    from phisight.export.plan import ExportOptions, Plan

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = f"""ONNX: --decoder int4 (default), int8, f16 or f32; the head and the embeddings are INT8 unless --head says
otherwise, or floats with a float decoder; the tower is exported for integer products (w8a8) with a quantised decoder,
which is the fastest on a CPU.

GGUF: --decoder q4_0 (default), q4_k_m, q5_k_m, q6_k, q8_0, f16, bf16, f32, iq4_xs, q3_k_m, ... by llama.cpp's names;
--vision f16 (default), f32 or q8_0 for the mmproj; the tower also goes beside it as ONNX, as --onnx-vision says.

--plan FILE is a JSON object of types for single tensors, by their GGUF names {{"blk.0.ffn_down.weight": "Q6_K"}}, or
for ONNX by the checkpoint's {{"lm_head.weight": "int8 block 32"}}.

--method search fits each block's scale to the inputs' second moments, awq scales channels of large inputs up and clips,
gptq corrects each rounding error by the weights that are rounded later, awq+gptq does so after awq's scaling. All of
them read calibration data first, layer by layer.

{MIXED_HELP}

{CALIBRATION_HELP}

What is interrupted, by Ctrl-C, a full disk or a kill, goes on with the same command. CHECKPOINT as owner/name is
fetched from the Hugging Face hub, unless there is such a path; that goes on likewise.

examples:
  phisight export path/to/checkpoint phi4-int4
  phisight export path/to/checkpoint phi4-int4-b128 --block-size 128 --dry-run
  phisight export path/to/checkpoint phi4-gptq --decoder int4 --method gptq --calibration receipts
  phisight export path/to/checkpoint phi4-mixed --size 4.8bpw --method gptq
  phisight export path/to/checkpoint phi4-mixed --format gguf --budget "kld<0.01" --dry-run
  phisight export path/to/checkpoint phi4-mixed --plan phi4-mixed.plan.json
  phisight export path/to/checkpoint phi4-int4 --decoder int4 --kv int8
  phisight export path/to/checkpoint phi4-cuda --decoder int4 --vision f16 --float f16
  phisight export path/to/checkpoint phi4-gguf --format gguf --decoder q4_k_m
  phisight export path/to/checkpoint phi4-gguf --format gguf --decoder iq4_xs --imatrix phi4.imatrix.gguf
  phisight export microsoft/Phi-4-reasoning-vision-15B phi4-int4 --stream-shards
  phisight export demo demo-int4 --decoder int4 --force"""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""A name of the hub: owner/name."""
ONNX_ONLY = ("block_size", "head", "float_type", "accuracy_level", "asymmetric", "kv")
GGUF_ONLY = ("onnx_vision", "imatrix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a directory of safetensors, owner/name of the hub, or demo"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the model directory to make")
    parser.add_argument("--format", choices=["onnx", "gguf"], default="onnx", help="file format (default: onnx)")
    parser.add_argument("--decoder", metavar="TYPE", help="decoder weights (default: int4, or q4_0 for GGUF)")
    parser.add_argument("--vision", metavar="TYPE", help="vision tower and projector")
    parser.add_argument(
        "--block-size", type=int, choices=[32, 64, 128], help="ONNX: weights that share a scale (default: 32)"
    )
    parser.add_argument(
        "--asymmetric",
        action="store_const",
        const=True,
        help="ONNX: INT4 blocks with a zero point each, 4.63 bits per weight in blocks of 32",
    )
    parser.add_argument("--head", choices=["int8", "int4", "f16", "f32"], help="ONNX: output head and embeddings")
    parser.add_argument(
        "--float",
        dest="float_type",
        choices=["f32", "f16"],
        help="ONNX: type in which the graphs compute: f32 for CPUs, f16 for CUDA (default: f32)",
    )
    parser.add_argument(
        "--method",
        choices=["rtn", "search", "awq", "gptq", "awq+gptq"],
        help="how blocks are chosen, of q4_0 and q8_0 in GGUF; all but rtn calibrate first (default: rtn)",
    )
    add_calibration_options(parser)
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=[0, 4],
        help="ONNX: 4 rounds activations to INT8 block by block, 0 computes in the float type (default: 4)",
    )
    parser.add_argument(
        "--onnx-vision",
        choices=["f32", "f16", "int8", "w8a8", "none"],
        help="GGUF: the tower as ONNX beside the files (default: w8a8)",
    )
    parser.add_argument("--plan", metavar="FILE", type=Path, help="types of single tensors")
    add_mixed_options(parser)
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        type=Path,
        help="GGUF: an importance matrix, of phisight imatrix or llama.cpp",
    )
    parser.add_argument(
        "--kv",
        choices=["int8"],
        help="ONNX: also write a graph with an INT8 KV cache, a quarter of the memory; its ranges are measured on "
        "built-in data, for which the exported model is opened once",
    )
    parser.add_argument(
        "--image-attention",
        choices=["causal", "bidirectional"],
        help="bidirectional: the tokens of an image see each other; the model can then be run either way "
        "(default: causal, as the reference)",
    )
    parser.add_argument(
        "--stream-shards",
        action="store_true",
        help="from the hub: fetch each shard when it is needed and delete it afterwards, instead of all at first",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is an exported model")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    foreign = GGUF_ONLY if args.format == "onnx" else ONNX_ONLY
    for name in foreign:
        if getattr(args, name) is not None:
            option = "float" if name == "float_type" else name.replace("_", "-")
            raise InputError(f"--{option} does not go with --format {args.format}: leave it out")
    mixed = is_mixed(args)
    for name in CALIBRATION_OPTIONS if args.method in (None, "rtn") and not mixed else ():
        if getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} goes with --method search, awq, gptq or awq+gptq, and with --size or "
                "--budget: name one, or leave it out"
            )
    with _source(args, console) as source:
        return _export(args, source, console)


def _export(args: argparse.Namespace, checkpoint: Checkpoint, console: Console) -> int:
    from phisight.export.convert import check_output, export_gguf, export_onnx
    from phisight.export.gguf_plan import GgufPlan

    mixed = is_mixed(args)
    plan = _plan(args, checkpoint)
    check_output(args.out, plan, force=args.force)
    found: Mixed | None = None
    if mixed:
        found = mix(args, checkpoint, plan, partial(_make_plan, args, checkpoint), console)
        plan = found.plan
    for line in describe_plan(plan.entries(), plan.unused, checkpoint.config):
        console.line(line)
    if args.method and args.decoder in ("f32", "f16"):
        console.note(f"phisight: note: --method {args.method} has no effect on a decoder in {args.decoder}")
    result: dict[str, Any] = {"out": str(args.out), "options": {"format": args.format, **plan.options.as_json()}}
    result["plan"] = plan.as_json()
    if found is not None:
        result |= {"plan_file": str(plan_place(args.out)), "measured": found.document}
    if args.dry_run:
        if mixed:
            _clear_work(args)
        if args.json:
            console.document(result | {"dry_run": True})
        return 0
    calibration, quantized = None, None
    if found is not None:
        calibration, quantized = found.calibration, found.quantized
    elif plan.options.method != "rtn" and plan.options.decoder not in ("f16", "f32"):
        data = read_data(args, checkpoint, console)
        quantized = quantize(args, checkpoint, plan, data, work_directory(args.out), console)
        plan = weighed_plan(checkpoint, plan, quantized, data)
        calibration = quantized.calibration
    export = (
        partial(export_gguf, checkpoint, plan) if isinstance(plan, GgufPlan) else partial(export_onnx, checkpoint, plan)
    )
    began = time.perf_counter()
    with (
        console.progress("weights", plan.total_weights(), "w") as bar,
        _measured(args, console) as more,
        _kept(args.out, console),
    ):
        manifest = export(
            args.out,
            force=args.force,
            quantized=None if quantized is None else quantized.weights,
            calibration=calibration,
            progress=bar.add,
            tell=lambda line: console.note(f"phisight: note: {line}"),
            **more,
        )
    seconds = time.perf_counter() - began
    _clear_work(args)
    size = sum(entry.bytes for entry in manifest.files.values())
    console.line(f"{args.out}: {size / 1e6:,.1f} MB in {len(manifest.files)} files, {seconds:.1f} s")
    if isinstance(plan, GgufPlan):
        console.line(_server_line(args.out, sorted(manifest.files)))
    if args.json:
        files = sorted(manifest.files)
        console.document(result | {"dry_run": False, "bytes": size, "seconds": seconds, "files": files})
    return 0


@contextmanager
def _measured(args: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """What an export with --kv needs: progress of reading the data on which its ranges are measured."""
    if args.kv is None:
        yield {}
        return
    from phisight.export.int8_kv import KV_TOKENS

    with console.progress("KV ranges", KV_TOKENS, "tok") as bar:
        yield {"kv_progress": bar.add}


@contextmanager
def _source(args: argparse.Namespace, console: Console) -> Iterator[Checkpoint]:
    """The checkpoint of a directory, or of a repository of the hub, fetched as the options say."""
    with needs_extra("export"):
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.convert import check_place_is_free
    repository = REPOSITORY.fullmatch(args.checkpoint) is not None and not Path(args.checkpoint).exists()
    if not repository:
        if args.stream_shards:
            raise InputError(f"--stream-shards goes with a repository of the hub, but {args.checkpoint} is none")
        yield Checkpoint.open(checkpoint_directory(args.checkpoint))
        return
    with needs_extra("hub"):
        from phisight.export.hub import fetch_checkpoint, stream_checkpoint
    if args.stream_shards and (is_mixed(args) or args.method not in (None, "rtn")):
        raise InputError(
            "--stream-shards reads each shard once, but calibration reads them often: leave one of them out"
        )
    check_place_is_free(args.out, force=args.force)
    if not (args.stream_shards or args.dry_run):
        yield Checkpoint.open(fetch_checkpoint(args.checkpoint, console.note))
        return
    folder = args.out.absolute().with_name(f".{args.out.name}.shards")
    yield stream_checkpoint(args.checkpoint, folder)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _kept(out: Path, console: Console) -> Iterator[None]:
    """Says after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        from phisight.export.directory import partial_directory

        partial = partial_directory(out)
        console.note(f"phisight: note: what is written stays in {partial}, and the same command goes on from there")
        raise


def _clear_work(args: argparse.Namespace) -> None:
    """What only this command can have left in the work directory is of no more use."""
    if is_mixed(args) or args.method not in (None, "rtn"):
        shutil.rmtree(work_directory(args.out), ignore_errors=True)


def _plan(args: argparse.Namespace, checkpoint: Checkpoint) -> Plan | GgufPlan:
    """The plan that the options ask for. Raises InputError, for a plan file with its line."""
    if args.plan is None:
        return _make_plan(args, checkpoint, ())
    from phisight.export.plan_file import read_plan

    file = read_plan(args.plan, args.format)
    try:
        return _make_plan(args, checkpoint, file.types)
    except InputError as error:
        named = max((name for name, _ in file.types if name in str(error)), key=len, default=None)
        raise InputError(f"{file.path if named is None else file.at(named)}: {error}") from None


def _make_plan(
    args: argparse.Namespace, checkpoint: Checkpoint, overrides: tuple[tuple[str, str], ...]
) -> Plan | GgufPlan:
    """With types of single tensors. Raises InputError."""
    from phisight.export.convert import plan_export, plan_gguf

    if args.format == "gguf":
        return plan_gguf(checkpoint, _gguf_options(args, overrides))
    return plan_export(checkpoint, _onnx_options(args, overrides))


def _onnx_options(args: argparse.Namespace, overrides: tuple[tuple[str, str], ...]) -> ExportOptions:
    """What was said; what was not is the exporter's default. Raises InputError."""
    from phisight.export.plan import ExportOptions

    names = ("decoder", "vision", "method", "image_attention", *ONNX_ONLY)
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    return ExportOptions(**changes, overrides=tuple((name, label.lower()) for name, label in overrides))


def _gguf_options(args: argparse.Namespace, overrides: tuple[tuple[str, str], ...]) -> GgufOptions:
    """As `_onnx_options`."""
    from phisight.export.gguf_plan import GgufOptions

    changes: dict[str, Any] = {"overrides": tuple((name, kind.upper()) for name, kind in overrides)}
    if args.decoder is not None:
        changes["decoder"] = args.decoder.upper()
    if args.vision is not None:
        changes["vision"] = args.vision.upper()
    if args.onnx_vision is not None:
        changes["onnx_vision"] = args.onnx_vision
    if args.method is not None:
        changes["method"] = args.method
    if args.image_attention is not None:
        changes["image_attention"] = args.image_attention
    if args.imatrix is not None:
        from phisight.quant.imatrix import ImportanceMatrix

        changes["imatrix"] = ImportanceMatrix.read(args.imatrix)
    return GgufOptions(**changes)


def _server_line(out: Path, files: Sequence[str]) -> str:
    """The command that serves the files with llama.cpp, which sizes pictures otherwise than the model wants."""
    text = next(name for name in files if name.startswith("model-"))
    mmproj = next((f" --mmproj {out / name}" for name in files if name.startswith("mmproj-")), "")
    return f"serve it: llama-server -m {out / text}{mmproj} --jinja"
