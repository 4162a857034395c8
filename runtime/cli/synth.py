"""`phisight synth`: a checkpoint of random weights that exports and runs as the real one does."""

from __future__ import annotations

import argparse
from pathlib import Path

from phisight.cli.console import Console
from phisight.cli.extras import needs_extra

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """The weights are random: such a model shows sizes, times and memory, its answers have no meaning.

examples:
  phisight synth small --layers 4
  phisight synth wide --layers 2 --width real
  phisight export wide wide-int4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="the checkpoint directory to make")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers; the real model has 40 (default: 2)")
    parser.add_argument(
        "--width",
        choices=["tiny", "real"],
        default="tiny",
        help="sizes of all else: tiny, or as the real model, 2.2 GB and 0.7 GB a layer (default: tiny)",
    )
    parser.add_argument("--seed", type=int, default=0, help="other weights (default: 0)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a synthetic checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    with needs_extra("export"):
        from phisight.export.names import expected_tensors
        from phisight.export.synth import synthesize, synthetic_model

    specs = expected_tensors(synthetic_model(args.width, args.layers)).values()
    weights = sum(spec.size for spec in specs)
    with console.progress("weights", weights, "w") as bar:
        synthesize(args.out, layers=args.layers, width=args.width, seed=args.seed, force=args.force, progress=bar.add)
    files = sorted(path.name for path in args.out.iterdir())
    size = sum((args.out / name).stat().st_size for name in files)
    if args.json:
        console.document({"out": str(args.out), "weights": weights, "bytes": size, "files": files})
    else:
        console.line(f"{args.out}: {weights:,} weights, {size / 1e6:,.1f} MB in {len(files)} files")
    return 0
