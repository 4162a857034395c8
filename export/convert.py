"""The whole export: checkpoint -> plan -> graphs and weights -> model directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phisight.errors import InputError
from phisight.export.calibration.sources import read_calibration
from phisight.export.checkpoint import Checkpoint
from phisight.export.directory import check_name, check_place, continued_directory
from phisight.export.gguf_directory import GgufNames, modelfile
from phisight.export.gguf_plan import GgufOptions, GgufPlan, make_gguf_plan
from phisight.export.gguf_writer import check_types, write_mmproj, write_text
from phisight.export.int8_kv import KV_TOKENS, write_int8_kv
from phisight.export.names import EMBEDDINGS
from phisight.export.onnx_decoder import build_decoder
from phisight.export.onnx_vision import build_vision
from phisight.export.onnx_writer import write_embeddings, write_graph
from phisight.export.output import OutputDirectory
from phisight.export.parallel import Progress
from phisight.export.plan import ExportOptions, Plan, make_plan
from phisight.export.quantized import QuantizedWeights
from phisight.manifest import FILE_NAME, Manifest
from phisight.quant.scheme import ChannelScheme

__all__ = [
    "check_output",
    "check_place_is_free",
    "check_tokenizer",
    "export_gguf",
    "export_onnx",
    "plan_export",
    "plan_gguf",
]

KIND = "an exported model"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files of a checkpoint that a model directory carries along where they exist; the first must."""


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> Plan:
    """The plan, and whether the checkpoint has what else the export needs. Raises InputError."""
    check_tokenizer(checkpoint)
    return make_plan(checkpoint.config, options)


def plan_gguf(checkpoint: Checkpoint, options: GgufOptions) -> GgufPlan:
    """As `plan_export`. Raises InputError, or EngineError where a type needs ggml's quantiser and it is missing."""
    check_tokenizer(checkpoint)
    plan = make_gguf_plan(checkpoint, options)
    check_types(plan)
    return plan


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Raises InputError if the checkpoint has no tokenizer."""
    if not (checkpoint.directory / COPIED[0]).is_file():
        raise InputError(
            f"checkpoint {checkpoint.directory} has no {COPIED[0]}: download it with the checkpoint's other files"
        )


def check_output(out: Path, plan: Plan | GgufPlan, *, force: bool) -> None:
    """Refuse an existing directory without `force`, anything but a model with it, a disk without room."""
    check_place(out, plan.total_bytes(), kind=KIND, ours=_is_model, force=force)


def check_place_is_free(out: Path, *, force: bool) -> None:
    """`check_output` before there is a plan."""
    check_name(out, kind=KIND, ours=_is_model, force=force)


def export_onnx(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    quantized: QuantizedWeights | None = None,
    calibration: Mapping[str, Any] | None = None,
    progress: Progress = lambda weights: None,
    kv_progress: Progress = lambda positions: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write the model directory `out`. `progress` counts weights, `tell` gets a line if an earlier run is continued.

    For an INT8 KV cache the decoder then reads KV_TOKENS positions of built-in data, which `kv_progress` counts.

    Interrupted at any moment, it leaves what is written beside `out`, and the same call goes on from there.

    Weights that are `quantized` already are taken from there, the others rounded to the nearest. `calibration` is what
    the manifest tells of how that was done.

    Raises InputError, CheckpointError, or PhisightError for a disk that is full; `out` is then as it was.
    """
    check_output(out, plan, force=force)
    identity = _identity(checkpoint, plan, calibration)
    with continued_directory(out, identity, plan.total_bytes(), tell) as (work, journal):
        output = OutputDirectory(work, journal)
        _write_files(checkpoint, plan, output, progress, quantized)
        if plan.options.kv is not None:
            data = read_calibration("demo", checkpoint.directory, checkpoint.config, tokens=KV_TOKENS)
            write_int8_kv(checkpoint, data, output, kv_progress)
        manifest = _manifest("onnx", checkpoint, plan, output, calibration)
        manifest.write(work)
    return manifest


def export_gguf(
    checkpoint: Checkpoint,
    plan: GgufPlan,
    out: Path,
    *,
    force: bool = False,
    quantized: QuantizedWeights | None = None,
    calibration: Mapping[str, Any] | None = None,
    progress: Progress = lambda weights: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write a directory of GGUF files, with the tower as ONNX beside them if planned. As `export_onnx`.

    Raises EngineError where a type needs ggml's quantiser and llama-cpp-python is missing.
    """
    check_output(out, plan, force=force)
    names = GgufNames.of(plan.options, has_vision=checkpoint.config.vision is not None)
    identity = _identity(checkpoint, plan, calibration)
    with continued_directory(out, identity, plan.total_bytes(), tell) as (work, journal):
        output = OutputDirectory(work, journal)
        write_text(names.text, checkpoint, plan, output, progress, quantized)
        if names.mmproj is not None:
            write_mmproj(names.mmproj, checkpoint, plan, output, progress)
        if plan.onnx is not None:
            _write_vision(checkpoint, plan.onnx, output, progress)
        with output.open("Modelfile") as file:
            file.write(modelfile(names, checkpoint.config).encode())
        _copy_files(checkpoint, output)
        manifest = _manifest("gguf", checkpoint, plan, output, calibration)
        manifest.write(work)
    return manifest


def _write_files(
    checkpoint: Checkpoint,
    plan: Plan,
    output: OutputDirectory,
    progress: Progress,
    quantized: QuantizedWeights | None,
) -> None:
    """In the order of a checkpoint's shards, each of which is then needed once."""
    scheme = plan.schemes[EMBEDDINGS]
    assert not isinstance(scheme, ChannelScheme)
    write_embeddings(checkpoint.tensors[EMBEDDINGS], scheme, output, progress)
    graph, jobs = build_decoder(checkpoint.config.decoder, plan, "decoder.onnx.data")
    write_graph(graph, jobs, checkpoint, output, progress, quantized)
    if checkpoint.config.vision is not None:
        _write_vision(checkpoint, plan, output, progress)
    _copy_files(checkpoint, output)


def _write_vision(checkpoint: Checkpoint, plan: Plan, output: OutputDirectory, progress: Progress) -> None:
    config = checkpoint.config
    if config.vision is None:
        raise ValueError("a text-only checkpoint has no tower")
    graph, jobs = build_vision(config.vision, config.decoder.hidden_size, plan, "vision.onnx.data")
    write_graph(graph, jobs, checkpoint, output, progress)


def _copy_files(checkpoint: Checkpoint, output: OutputDirectory) -> None:
    for name in COPIED:
        if (checkpoint.directory / name).is_file():
            output.copy(checkpoint.directory / name)


def _manifest(
    form: str,
    checkpoint: Checkpoint,
    plan: Plan | GgufPlan,
    output: OutputDirectory,
    calibration: Mapping[str, Any] | None = None,
) -> Manifest:
    return Manifest(
        format=form,
        phisight=version("phisight"),
        model=checkpoint.config,
        options=plan.options.as_json(),
        files=output.entries,
        tensors=plan.entries(),
        calibration=None if calibration is None else dict(calibration),
    )


def _identity(checkpoint: Checkpoint, plan: Plan | GgufPlan, calibration: Mapping[str, Any] | None) -> dict[str, str]:
    """What decides every byte of the output: an export goes on only where all of it is as it was."""
    options = [plan.options.as_json(), plan.as_json(), calibration]
    return {
        "source": checkpoint.fingerprint(),
        "options": hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest(),
        "version": " ".join(f"{name} {version(name)}" for name in ("phisight", "numpy", "gguf")),
    }


def _is_model(directory: Path) -> bool:
    return (directory / FILE_NAME).is_file()
