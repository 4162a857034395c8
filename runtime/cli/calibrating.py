"""Options and progress of the commands that calibrate a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from phisight.cli.console import Console
from phisight.threads import choose_threads

if TYPE_CHECKING:
    from phisight.export.calibration.data import CalibrationData
    from phisight.export.calibration.run import Calibration, Consumer
    from phisight.export.checkpoint import Checkpoint

__all__ = [
    "CALIBRATION_HELP",
    "CALIBRATION_OPTIONS",
    "add_calibration_options",
    "calibrate",
    "read_data",
    "work_directory",
]

CALIBRATION_HELP = """--calibration demo (default) draws pictures with questions and adds a text of our own; text is
that text alone; a .txt file is read as it is; a folder has pictures with cases.jsonl (see phisight eval --tasks), .txt
files, or .jsonl files with {"text": ...} on each line.

Calibrated are the decoder's layers and the head. The embeddings, the vision tower and the projector are not: whatever
the method, they are rounded to the nearest.

An interrupted run leaves OUT.work behind: the same command goes on from there."""

CALIBRATION_OPTIONS = ("calibration", "calibration_tokens", "image_token_weight", "calibration_threads")
DEFAULT_WEIGHT = 1.0
"""By bench/calibration.py, see docs/quantisation.md."""


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calibration", metavar="DATA", help="demo, text, a text file or a folder (default: demo)")
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N", help="of pictures and text together (default: 24576)"
    )
    parser.add_argument(
        "--image-token-weight",
        type=float,
        metavar="W",
        help=f"what a token of a picture counts, where one of text counts 1 (default: {DEFAULT_WEIGHT:g}; on the "
        "built-in model 0.1 to 1 measured alike, 3 worse)",
    )
    parser.add_argument(
        "--calibration-threads", type=int, metavar="N", help="of the engine (default: what suits the machine)"
    )


def work_directory(out: Path) -> Path:
    """Where a calibration for `out` keeps what it has done."""
    return out.with_name(f"{out.name}.work")


def read_data(args: argparse.Namespace, checkpoint: Checkpoint, console: Console, more: int = 0) -> CalibrationData:
    """The data that the options ask for with `more` tokens, and a line on each source. Raises InputError."""
    from phisight.export.calibration.sources import DEFAULT_TOKENS, read_calibration

    tokens = DEFAULT_TOKENS if args.calibration_tokens is None else args.calibration_tokens
    source = "demo" if args.calibration is None else args.calibration
    data = read_calibration(source, checkpoint.directory, checkpoint.config, tokens=tokens + more)
    for each in data.sources:
        console.line(
            f"calibration: {each.name:<20}{each.sequences:>6} sequences{each.pictures:>6} pictures"
            f"{each.text_tokens:>8} text tokens{each.image_tokens:>8} image tokens"
        )
    return data


def calibrate(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    data: CalibrationData,
    console: Console,
    consumer: Consumer = lambda layer: None,
    *,
    hessians: bool = False,
    purpose: str = "",
    work: Path | None = None,
) -> Calibration:
    """Calibrate in `work`, else that of `args.out`, going on where an earlier run stopped. Raises PhisightError."""
    from phisight.export.calibration.run import Calibration, CalibrationOptions

    weight = DEFAULT_WEIGHT if args.image_token_weight is None else args.image_token_weight
    threads = choose_threads("auto" if args.calibration_threads is None else args.calibration_threads).count
    options = CalibrationOptions(weight, hessians, purpose, threads)
    work = work or work_directory(args.out)
    resumed = work.exists()
    calibration = Calibration(checkpoint, data, work, options)
    if resumed:
        console.note(f"phisight: note: {work} is of an interrupted run: going on from there")
    with console.progress("calibrate", calibration.work_left, "tok") as bar:
        calibration.run(consumer, bar.add)
    return calibration
