"""`phisight export`: a checkpoint becomes a model directory. The plan is shown before any work starts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.cli.tables import describe_plan
from phisight.model import checkpoint_directory

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """The decoder's matrices are stored as --decoder says; the head and the embeddings as INT8 unless --head
says otherwise, or as floats with a float decoder. The vision tower is exported for integer products (w8a8)
with a quantised decoder, which is the fastest on a CPU.

examples:
  phisight export path/to/checkpoint phi4-int4
  phisight export path/to/checkpoint phi4-int4-b128 --block-size 128 --dry-run
  phisight export path/to/checkpoint phi4-f16 --decoder int4 --vision f16 --float f16
  phisight export demo demo-int4 --decoder int4 --force"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory of safetensors, or demo")
    parser.add_argument("out", metavar="OUT", type=Path, help="the model directory to make")
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="file format (default: onnx)")
    parser.add_argument(
        "--decoder", choices=["f32", "f16", "int8", "int4"], default="int4", help="decoder weights (default: int4)"
    )
    parser.add_argument("--vision", choices=["f32", "f16", "int8", "w8a8"], help="vision tower and projector")
    parser.add_argument(
        "--block-size", type=int, choices=[32, 64, 128], default=32, help="weights that share a scale (default: 32)"
    )
    parser.add_argument("--head", choices=["int8", "int4", "f16", "f32"], help="output head and embeddings")
    parser.add_argument(
        "--float",
        dest="float_type",
        choices=["f32", "f16"],
        default="f32",
        help="type in which the graphs compute: f32 for CPUs, f16 for CUDA (default: f32)",
    )
    parser.add_argument("--method", choices=["rtn"], help="how weights are rounded (default: rtn)")
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=[0, 4],
        default=4,
        help="4 rounds activations to INT8 block by block, 0 computes in the float type (default: 4)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is an exported model")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    with needs_extra("export"):
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.convert import check_output, export_onnx, plan_export
        from phisight.export.plan import ExportOptions

    options = ExportOptions(
        decoder=args.decoder,
        vision=args.vision,
        block_size=args.block_size,
        head=args.head,
        float_type=args.float_type,
        method=args.method or "rtn",
        accuracy_level=args.accuracy_level,
    )
    checkpoint = Checkpoint.open(checkpoint_directory(args.checkpoint))
    plan = plan_export(checkpoint, options)
    check_output(args.out, plan, force=args.force)
    for line in describe_plan(plan, checkpoint.config):
        console.line(line)
    if args.method and options.decoder in ("f32", "f16"):
        console.note(f"phisight: note: --method {args.method} has no effect on a decoder in {options.decoder}")
    result: dict[str, Any] = {"out": str(args.out), "options": options.as_json(), "plan": plan.as_json()}
    if args.dry_run:
        if args.json:
            console.document(result | {"dry_run": True})
        return 0
    with console.progress("weights", plan.total_weights(), "w") as weights:
        manifest = export_onnx(checkpoint, plan, args.out, force=args.force, progress=weights.add)
    size = sum(entry.bytes for entry in manifest.files.values())
    console.line(f"{args.out}: {size / 1e6:,.1f} MB in {len(manifest.files)} files")
    if args.json:
        console.document(result | {"dry_run": False, "bytes": size, "files": sorted(manifest.files)})
    return 0
