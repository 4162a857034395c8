"""`phisight info`: what a model directory or a checkpoint is."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.cli.tables import describe_config, describe_tensors
from phisight.manifest import FILE_NAME, Manifest, bits_per_weight
from phisight.model import checkpoint_directory, model_directory

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  phisight info demo
  phisight info path/to/checkpoint
  phisight info phi4-int4 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model directory, a checkpoint directory, or demo")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    directory = model_directory(args.model)
    if (directory / FILE_NAME).is_file() or not (directory / "config.json").is_file():
        return _model(args.model, directory, console)
    return _checkpoint(directory, console)


def _model(name: str, directory: Path, console: Console) -> int:
    manifest = Manifest.read(directory)
    size = sum(entry.bytes for entry in manifest.files.values())
    if console.as_json:
        data: dict[str, Any] = {"kind": "model", "path": str(directory), "bytes": size, **asdict(manifest)}
        data["bits_per_weight"] = {
            "decoder": bits_per_weight(manifest.tensors, "decoder"),
            "head_and_embeddings": bits_per_weight(manifest.tensors, "head", "embeddings"),
            "vision": bits_per_weight(manifest.tensors, "vision", "projector"),
        }
        if name == "demo":
            data["checkpoint"] = str(checkpoint_directory(name))
        console.document(data)
        return 0
    console.line(f"{directory}: {manifest.format} model, {size / 1e6:,.1f} MB, made by phisight {manifest.phisight}")
    console.line("options: " + ", ".join(f"{key} {value}" for key, value in manifest.options.items()))
    for line in describe_config(manifest.model):
        console.line(line)
    for line in describe_tensors(manifest.tensors):
        console.line(line)
    if name == "demo":
        console.line(f"its checkpoint: {checkpoint_directory(name)}")
    return 0


def _checkpoint(directory: Path, console: Console) -> int:
    with needs_extra("export"):
        from phisight.export.checkpoint import Checkpoint
    checkpoint = Checkpoint.open(directory)
    tensors = checkpoint.tensors.values()
    weights = sum(tensor.size for tensor in tensors)
    dtypes = sorted({tensor.dtype for tensor in tensors})
    if console.as_json:
        console.document(
            {
                "kind": "checkpoint",
                "path": str(directory),
                "model": asdict(checkpoint.config),
                "weights": weights,
                "tensors": {t.spec.name: {"shape": t.shape, "dtype": t.dtype, "part": t.spec.part} for t in tensors},
            }
        )
        return 0
    console.line(f"{directory}: checkpoint, {len(tensors)} tensors, {weights:,} weights in {', '.join(dtypes)}")
    for line in describe_config(checkpoint.config):
        console.line(line)
    console.line(f"never used by the model: {len(checkpoint.unused)} tensors")
    return 0
