"""`phisight imatrix`: how much each column of a checkpoint's weights matters, for llama.cpp's quantisers and ours."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.errors import InputError
from phisight.loading import checkpoint_directory
from phisight.threads import choose_threads

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """The checkpoint reads questions about pictures and text, layer by layer, in little memory. The file goes to
phisight export --format gguf --imatrix OUT, or to llama-quantize --imatrix OUT.

--calibration demo (default) draws pictures with questions and adds a text that comes with phisight; text is that text
alone; a .txt file is read as it is; a folder has pictures with cases.jsonl (see phisight eval --tasks), .txt files, or
.jsonl files with {"text": ...} on each line.

An interrupted run leaves OUT.work behind: the same command goes on from there.

examples:
  phisight imatrix path/to/checkpoint phi4.imatrix.gguf
  phisight imatrix path/to/checkpoint receipts.imatrix.gguf --calibration receipts --tokens 32768
  phisight imatrix demo demo.imatrix.gguf --image-token-weight 0.5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory of safetensors, or demo")
    parser.add_argument("out", metavar="OUT", type=Path, help="the importance matrix to make, a .gguf file")
    parser.add_argument(
        "--calibration", metavar="DATA", default="demo", help="demo, text, a text file or a folder (default: demo)"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of pictures and text together (default: 24576)")
    parser.add_argument(
        "--image-token-weight",
        type=float,
        metavar="W",
        default=1.0,
        help="what a token of a picture counts, where one of text counts 1 (default: 1)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: what suits the machine")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is an importance matrix")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    with needs_extra("export"):
        from phisight.export.calibration.importance import importance_matrix
        from phisight.export.calibration.run import Calibration, CalibrationOptions
        from phisight.export.calibration.sources import DEFAULT_TOKENS, read_calibration
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.convert import check_tokenizer

    _check_place(args.out, args.force)
    threads = choose_threads("auto" if args.threads is None else args.threads).count
    options = CalibrationOptions(args.image_token_weight, threads=threads)
    checkpoint = Checkpoint.open(checkpoint_directory(args.checkpoint))
    check_tokenizer(checkpoint)
    tokens = DEFAULT_TOKENS if args.tokens is None else args.tokens
    data = read_calibration(args.calibration, checkpoint.directory, checkpoint.config, tokens=tokens)
    for source in data.sources:
        console.line(
            f"{source.name:<20}{source.sequences:>6} sequences{source.pictures:>6} pictures"
            f"{source.text_tokens:>8} text tokens{source.image_tokens:>8} image tokens"
        )
    work = args.out.with_name(f"{args.out.name}.work")
    resumed = work.exists()
    calibration = Calibration(checkpoint, data, work, options)
    if resumed:
        console.note(f"phisight: note: {work} is of an interrupted run: going on from there")
    with console.progress("calibrate", calibration.work_left, "tok") as bar:
        calibration.run(progress=bar.add)
    matrix = importance_matrix(calibration.moments(), data)
    matrix.write(args.out)
    shutil.rmtree(work, ignore_errors=True)
    console.line(f"{args.out}: {len(matrix.weights)} weights")
    if args.json:
        console.document(
            {
                "out": str(args.out),
                "weights": len(matrix.weights),
                "image_token_weight": options.image_token_weight,
                "sha256": matrix.digest,
                "calibration": data.as_json(),
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
