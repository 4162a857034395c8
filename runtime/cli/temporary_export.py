"""Opening whatever a user has: a checkpoint is exported for the time it is used, as exactly as it can be."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phisight.chunks import ImageAttention
from phisight.cli.asking import load_model
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.errors import InputError
from phisight.loading import is_checkpoint, model_directory
from phisight.model import Model

__all__ = ["opened_model", "usable_model"]

MOST_BYTES = 2 << 30
"""A larger float32 model is no passing thing: the 15B checkpoint would fill 60 GB."""


@contextmanager
def opened_model(args: argparse.Namespace, console: Console) -> Iterator[Model]:
    """The model of the command line; a checkpoint as `usable_model` has it.

    Raises as `load_model`, and InputError for a checkpoint that is too large for that.
    """
    with usable_model(args.model, console, args.image_attention) as path:
        yield load_model(args, path)


@contextmanager
def usable_model(name: str, console: Console, image_attention: ImageAttention | None = None) -> Iterator[Path]:
    """The model that `name` means; a checkpoint as ONNX in float32, in a directory that goes away again.

    Raises InputError for a checkpoint that is too large for that.
    """
    directory = model_directory(name)
    if not is_checkpoint(directory):
        yield directory
        return
    # On Windows files that the engine still holds open cannot be removed.
    with tempfile.TemporaryDirectory(prefix="phisight-", ignore_cleanup_errors=True) as folder:
        exported = Path(folder) / "model"
        _export(directory, exported, console, image_attention or "causal")
        console.note(f"phisight: note: {name} is a checkpoint: it is asked as ONNX in float32")
        yield exported


def _export(directory: Path, out: Path, console: Console, image_attention: ImageAttention) -> None:
    with needs_extra("export"):
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.convert import export_onnx, plan_export
        from phisight.export.plan import ExportOptions
    checkpoint = Checkpoint.open(directory)
    plan = plan_export(checkpoint, ExportOptions(decoder="f32", image_attention=image_attention))
    if plan.total_bytes() > MOST_BYTES:
        raise InputError(
            f"{directory} is a checkpoint of {plan.total_weights():,} weights, too large to be exported in passing: "
            f"export it first: phisight export {directory} OUT --decoder int4"
        )
    with console.progress("export", plan.total_weights(), "w") as weights:
        export_onnx(checkpoint, plan, out, progress=weights.add)
