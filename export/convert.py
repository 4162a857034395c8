"""The whole export: checkpoint -> plan -> graphs and weights -> model directory.

The directory is made beside its final place and renamed when it is complete, so that nothing half-written ever stands
under the final name.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from phisight.errors import InputError, PhisightError
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import EMBEDDINGS
from phisight.export.onnx_decoder import build_decoder
from phisight.export.onnx_vision import build_vision
from phisight.export.onnx_writer import Progress, write_embeddings, write_graph
from phisight.export.output import OutputDirectory
from phisight.export.plan import ExportOptions, Plan, make_plan
from phisight.manifest import Manifest
from phisight.quant.scheme import ChannelScheme

__all__ = ["check_output", "export_onnx", "plan_export"]

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files of a checkpoint that a model directory carries along where they exist; the first must."""

SLACK = 64 << 20
"""Bytes of disk that an export wants beyond its weights: graphs, tables, tokenizer."""


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> Plan:
    """The plan, and whether the checkpoint has what else the export needs. Raises InputError."""
    if not (checkpoint.directory / COPIED[0]).is_file():
        raise InputError(
            f"checkpoint {checkpoint.directory} has no {COPIED[0]}: download it with the checkpoint's other files"
        )
    return make_plan(checkpoint.config, options)


def check_output(out: Path, plan: Plan, *, force: bool) -> None:
    """Refuse what cannot end well: an existing directory without `force`, a file, too little room on the disk."""
    if out.exists() and not force:
        raise InputError(f"{out} exists: choose another name, or replace it with --force")
    if out.exists() and not _replaceable(out):
        raise InputError(
            f"{out} is neither an exported model nor empty, so --force does not replace it: choose another name"
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory: make it first, or choose another place for {out.name}")
    needed, free = plan.total_bytes() + SLACK, shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(
            f"the export needs {needed / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free: "
            "make room or choose another disk"
        )


def export_onnx(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    progress: Progress = lambda weights: None,
) -> Manifest:
    """Write the model directory `out`. `progress` counts weights.

    Raises InputError, CheckpointError, or PhisightError for a disk that is full; `out` is then as it was.
    """
    check_output(out, plan, force=force)
    with _beside(out) as work:
        output = OutputDirectory(work)
        _write_files(checkpoint, plan, output, progress)
        manifest = Manifest(
            format="onnx",
            phisight=version("phisight"),
            model=checkpoint.config,
            options=plan.options.as_json(),
            files=output.entries,
            tensors=plan.entries(),
        )
        manifest.write(work)
    return manifest


def _write_files(checkpoint: Checkpoint, plan: Plan, output: OutputDirectory, progress: Progress) -> None:
    config = checkpoint.config
    if config.vision is not None:
        graph, jobs = build_vision(config.vision, config.decoder.hidden_size, plan, "vision.onnx.data")
        write_graph(graph, jobs, checkpoint, output, progress)
    graph, jobs = build_decoder(config.decoder, plan, "decoder.onnx.data")
    write_graph(graph, jobs, checkpoint, output, progress)
    scheme = plan.schemes[EMBEDDINGS]
    assert not isinstance(scheme, ChannelScheme)
    write_embeddings(checkpoint.tensors[EMBEDDINGS], scheme, output, progress)
    for name in COPIED:
        if (checkpoint.directory / name).is_file():
            output.copy(checkpoint.directory / name)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new directory next to `out` that takes its name at the end, and disappears if anything goes wrong."""
    work = _sibling(out, "partial")
    try:
        work.mkdir()
        yield work
        _replace(work, out)
    except OSError as error:
        raise PhisightError(f"writing {out} failed: {error.strerror or error}: make room and run it again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, out: Path) -> None:
    """Rename `work` to `out`. An older directory steps aside first, since no system renames over a full one."""
    if not out.exists():
        work.rename(out)
        return
    old = _sibling(out, "old")
    out.rename(old)
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sibling(out: Path, kind: str) -> Path:
    """A free name on the same disk, hidden, that says whose it is."""
    return out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.{kind}")


def _replaceable(out: Path) -> bool:
    """Only a model directory or an empty one: --force must never cost anybody other files."""
    return out.is_dir() and ((out / "phisight.json").is_file() or not any(out.iterdir()))
