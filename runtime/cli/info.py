"""`phisight info`: what a model directory or a checkpoint is."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from phisight.backends.llamacpp import KV_BYTES
from phisight.cli.console import Console
from phisight.cli.extras import needs_extra
from phisight.cli.tables import describe_config, describe_tensors
from phisight.devices import engine_devices
from phisight.errors import InputError
from phisight.gguf_file import GgufFile, MetadataValue
from phisight.loading import checkpoint_directory, is_checkpoint, model_directory
from phisight.loading_checks import kv_types
from phisight.manifest import Manifest, bits_per_weight

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  phisight info demo
  phisight info --devices
  phisight info path/to/checkpoint
  phisight info phi4-int4 --json
  phisight info model-q4_k_m.gguf"""


SHOWN = 8
SHOWN_CHARACTERS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a model directory, a GGUF file, a checkpoint directory, or demo"
    )
    parser.add_argument("--devices", action="store_true", help="what each engine finds here, instead of a model")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    if args.devices == (args.model is not None):
        raise InputError("phisight info takes either a MODEL or --devices: give one of them (see phisight info --help)")
    if args.devices:
        return _devices(console)
    directory = model_directory(args.model)
    if directory.is_file():
        return _gguf(directory, console)
    if is_checkpoint(directory):
        return _checkpoint(directory, console)
    return _model(args.model, directory, console)


def _devices(console: Console) -> int:
    found = engine_devices()
    if console.as_json:
        console.document({"kind": "devices", "engines": [asdict(entry) for entry in found]})
        return 0
    for entry in found:
        console.line(f"{entry.engine}: {', '.join(entry.devices) or 'none'} ({entry.reason})")
    return 0


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
        data["kv_bytes_per_token"] = _kv_bytes(manifest)
        data["image_attention"] = manifest.image_attention if manifest.model.images else None
        if name == "demo":
            data["checkpoint"] = str(checkpoint_directory(name))
        console.document(data)
        return 0
    console.line(f"{directory}: {manifest.format} model, {size / 1e6:,.1f} MB, made by phisight {manifest.phisight}")
    console.line("options: " + ", ".join(f"{key} {value}" for key, value in manifest.options.items()))
    for line in describe_config(manifest.model):
        console.line(line)
    kinds = ", ".join(f"{size / 1024:g} KiB as {name}" for name, size in _kv_bytes(manifest).items())
    console.line(f"KV cache: {kinds} a token")
    if manifest.model.images:
        console.line(f"image attention: {manifest.image_attention}")
    for line in describe_tensors(manifest.tensors):
        console.line(line)
    if name == "demo":
        console.line(f"its checkpoint: {checkpoint_directory(name)}")
    return 0


def _kv_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes of one position in the KV cache by type: all that llama.cpp offers, or those of the graphs."""
    decoder = manifest.model.decoder
    if manifest.format == "gguf":
        return {name: decoder.kv_bytes_per_token(of) // values for name, (of, values) in KV_BYTES.items()}
    sizes = {"f32": 4, "f16": 2, "int8": 1}
    return {name: decoder.kv_bytes_per_token(sizes[name]) for name in kv_types(manifest)}


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


def _gguf(path: Path, console: Console) -> int:
    """Metadata, types and sizes of a GGUF file, ours or another's."""
    file = GgufFile.read(path)
    metadata = {key: _short(value) for key, value in file.metadata.items()}
    if console.as_json:
        console.document(
            {
                "kind": "gguf",
                "path": str(path),
                "bytes": path.stat().st_size,
                "metadata": metadata,
                "tensors": {
                    t.name: {"shape": t.shape, "type": t.type_name, "weights": t.size, "bytes": t.bytes}
                    for t in file.tensors.values()
                },
            }
        )
        return 0
    console.line(f"{path}: {path.stat().st_size / 1e6:,.1f} MB, {len(file.tensors)} tensors")
    for key, value in metadata.items():
        console.line(f"  {key} = {value}")
    console.line(f"{'type':<10}{'tensors':>8}{'weights':>16}{'bytes':>16}{'bits/weight':>13}")
    for name in sorted({tensor.type_name for tensor in file.tensors.values()}):
        chosen = [tensor for tensor in file.tensors.values() if tensor.type_name == name]
        weights, size = sum(t.size for t in chosen), sum(t.bytes for t in chosen)
        console.line(f"{name:<10}{len(chosen):>8}{weights:>16,}{size:>16,}{8 * size / weights:>13.2f}")
    return 0


def _short(value: MetadataValue) -> Any:
    """A value for people and JSON: long lists and texts by their length."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > SHOWN:
        return f"[{len(value)} values]"
    if isinstance(value, str) and len(value) > SHOWN_CHARACTERS:
        return f"[{len(value)} characters]"
    return value
