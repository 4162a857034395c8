"""`phisight imatrix`: how much each column of a checkpoint's weights matters, for llama.cpp's quantisers and ours."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from phisight.cli.calibrating import (
    CALIBRATION_HELP,
    add_calibration_options,
    calibrate,
    read_data,
    work_directory,
)
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.errors import InputError
from phisight.loading import checkpoint_directory

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = f"""The checkpoint reads questions about pictures and text, layer by layer, in little memory. The file goes
to phisight export --format gguf --imatrix OUT, or to llama-quantize --imatrix OUT.

{CALIBRATION_HELP}

examples:
  phisight imatrix path/to/checkpoint phi4.imatrix.gguf
  phisight imatrix path/to/checkpoint receipts.imatrix.gguf --calibration receipts --calibration-tokens 32768
  phisight imatrix demo demo.imatrix.gguf --image-token-weight 0.5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory of safetensors, or demo")
    parser.add_argument("out", metavar="OUT", type=Path, help="the importance matrix to make, a .gguf file")
    add_calibration_options(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it is an importance matrix")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    with needs_extra("export"):
        from phisight.export.calibration.importance import importance_matrix
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.convert import check_tokenizer

    _check_place(args.out, args.force)
    checkpoint = Checkpoint.open(checkpoint_directory(args.checkpoint))
    check_tokenizer(checkpoint)
    data = read_data(args, checkpoint, console)
    calibration = calibrate(args, checkpoint, data, console)
    matrix = importance_matrix(calibration.moments(), data)
    matrix.write(args.out)
    shutil.rmtree(work_directory(args.out), ignore_errors=True)
    console.line(f"{args.out}: {len(matrix.weights)} weights")
    if args.json:
        console.document(
            {
                "out": str(args.out),
                "weights": len(matrix.weights),
                "sha256": matrix.digest,
                "calibration": calibration.as_json(),
            }
        )
    return 0


def _check_place(out: Path, force: bool) -> None:
    """Raises InputError for a place that cannot be written, or a file that is not to be replaced."""
    from phisight.quant.imatrix import ImportanceMatrix

    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.absolute().parent} is not a directory: make it first")
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out} exists: choose another name, or replace it with --force")
    ImportanceMatrix.read(out)  # --force must never cost anybody another file
