"""`phisight bench`: seconds of each stage of inference, beside another engine on the same weights."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from phisight.backends.llamacpp_library import Flash
from phisight.backends.ort_session import Device
from phisight.bench import Contender, Samples, Stage, as_report, measure, measure_bounds, stages_named
from phisight.bench.questions import question_seconds
from phisight.cli.budget_curve import add_curve_options, run_curve
from phisight.cli.console import Console
from phisight.cli.engine_choice import keep_measured
from phisight.cli.extras import needs_extra
from phisight.devices import PAIRED, DeviceChoice, choose_device, llamacpp_devices
from phisight.errors import InputError
from phisight.loading import checkpoint_directory, model_directory
from phisight.manifest import Manifest
from phisight.threads import choose_threads, read_threads

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """Every engine runs in a process of its own, and they take turns: medians of the runs are compared. For
--against llama.cpp the model's blocks are written as Q4_0 and Q8_0, the very same numbers, and its tower as F16, into a
temporary directory. A ratio is llama.cpp's time by ours; its settings are tried all, and its best counts. With
--checkpoint a Q4_K_M is made and timed as well, and told apart, since its weights are others. --against openvino times
that engine's decoder on the very same file; --device auto takes the faster engine for this model from then on.

A model with the widths of the 15B model and fewer layers is also timed with one layer less, which tells what a layer
takes and what all the rest: times of 40 and 26 layers follow from that.

--device cuda (a model exported with --float f16) and webgpu time a GPU; llama.cpp, if it was compiled for one, then has
everything on it. --device openvino+cpu times OpenVINO for prompts with ONNX Runtime for steps.

--budget-curve asks questions with known answers at several budgets of patches, and tells how many are right.

stages: encode_256, encode_1024, encode_3600 (patches), prefill and prefill_image (512 positions), decode (a step),
second_question (about the same image), load

examples:
  phisight bench demo --stages encode_256,prefill,decode
  phisight bench demo --budget-curve --tasks read,chart --out curve.svg
  phisight bench phi4-int4 --against llama.cpp --json
  phisight bench phi4-int4 --against openvino --stages prefill,decode
  phisight bench phi4-int4-f16 --device cuda"""

BUSY = 0.5
"""Processes that run on average, above which the machine has other work to do."""
REAL_HIDDEN = 5120
REAL_DECODER_LAYERS = 40
REAL_TOWER_LAYERS = 26
OURS = "phisight"
VARIANTS: tuple[tuple[str, bool, Flash], ...] = (
    ("llama.cpp", True, "auto"),
    ("llama.cpp, no flash attention", True, "off"),
    ("llama.cpp, not repacked", False, "auto"),
)
"""The first as llama.cpp comes. On a GPU nothing is repacked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an ONNX model directory, or demo")
    parser.add_argument("--against", choices=["llama.cpp", "openvino"], help="an engine to time on the same weights")
    parser.add_argument("--checkpoint", metavar="DIR", help="what MODEL was made of: llama.cpp runs its Q4_K_M, too")
    parser.add_argument("--stages", metavar="NAMES", help="some of the stages, with commas (default: all)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs of each stage (default: 5)")
    parser.add_argument("--device", choices=[*get_args(Device), PAIRED], default="cpu", help="where it runs")
    parser.add_argument("--threads", default="auto", metavar="N", help="threads, or auto (default)")
    add_curve_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace, console: Console) -> int:
    stages = stages_named(args.stages)
    if args.runs < 1:
        raise InputError(f"--runs is {args.runs}, wanted 1 or more")
    threads = choose_threads(read_threads(args.threads))
    if args.budget_curve:
        return run_curve(args, threads.count, console)
    for name in ("tasks", "n", "patches", "out"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} goes with --budget-curve: name that too, or leave it out")
    directory = model_directory(args.model)
    manifest = Manifest.read(directory)
    if manifest.format != "onnx":
        raise InputError(
            f"{directory} is a GGUF model, wanted an ONNX one: phisight compare --speed times models of either kind"
        )
    chosen = choose_device(args.device, str(manifest.options.get("float", "f32")))
    if manifest.model.vision is None:
        stages = tuple(stage for stage in stages if stage.kind != "encode")
    _check_others(args.against, chosen)
    if args.against == "openvino" and all(stage.kind in ("encode", "second_question") for stage in stages):
        raise InputError("--against openvino times the decoder: name stages such as prefill,decode")
    depth = _depth(manifest)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY:
        console.note(
            f"phisight: note: the machine is busy (load {load:.1f}): times and ratios mean little until it is idle"
        )
    if args.checkpoint is not None and args.against != "llama.cpp":
        raise InputError("--checkpoint goes with --against llama.cpp: name that too, or leave it out")
    engine: Literal["onnxruntime", "openvino+cpu"] = "openvino+cpu" if chosen.paired else "onnxruntime"
    group = manifest.least_block
    ours = Contender(OURS, engine, directory, manifest.model, threads.count, chosen.device, group=group)
    with ExitStack() as stack:
        deep = _contenders(args.against, ours, manifest, None, stack, console)
        if args.checkpoint is not None:
            deep.append(_k_quants(args.checkpoint, ours, stack, console))
        samples = _timed(deep, stages, args.runs, console)
        shallow: Samples | None = None
        if depth is not None:
            cut = _contenders(args.against, ours, manifest, depth, stack, console)
            layered = tuple(stage for stage in stages if stage.kind not in ("load", "second_question"))
            shallow = _timed(cut, layered, args.runs, console)
    report = as_report(
        stages,
        deep,
        samples,
        shallow,
        _depths(manifest, depth),
        measure_bounds(threads.count, chosen.device),
        sum(entry.bytes for entry in manifest.tensors.values() if entry.part in ("decoder", "head")),
    )
    if any(stage.kind == "second_question" for stage in stages):
        first, second = question_seconds(directory, threads.count, chosen.name)
        report["stages"]["second_question"] = {"ours_s": second, "first_s": first, "share_of_first": second / first}
    if args.against == "openvino":
        opening = [figures.load_seconds for figures in samples.figures.values()]
        if choice := keep_measured(directory, manifest, threads.count, report["stages"], opening):
            told = f"--device auto means {choice.name} for this model from now on, where it answers many questions"
            console.note(f"phisight: note: {told}: {choice.reason}")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "load_before": load,
    }
    report = {"model": str(args.model), "machine": machine, "device": chosen.name, "threads": threads.count, **report}
    if args.json:
        console.document(report)
    else:
        for line in _lines(report):
            console.line(line)
    return 0


def _check_others(against: str | None, chosen: DeviceChoice) -> None:
    """Raises InputError for an engine that cannot run where ours shall."""
    if against == "openvino" and chosen.name != "cpu":
        raise InputError(f"--against openvino goes with --device cpu, not {chosen.name}: leave one of them out")
    if against == "llama.cpp" and chosen.device != "cpu" and "gpu" not in (found := llamacpp_devices()).devices:
        raise InputError(
            f"--against llama.cpp with --device {chosen.name} needs llama.cpp on a GPU, too, but {found.reason}: "
            "see GGUF in the README, or leave one of them out"
        )


def _depth(manifest: Manifest) -> int | None:
    """Layers of the shallow model, or None where nothing is to be extrapolated."""
    d = manifest.model.decoder
    real = d.hidden_size == REAL_HIDDEN and 1 < d.num_layers < REAL_DECODER_LAYERS
    v = manifest.model.vision
    deep_tower = v is None or v.used_layers > 1
    return min(d.num_layers, v.used_layers if v else d.num_layers) - 1 if real and deep_tower else None


def _depths(manifest: Manifest, shallow: int | None) -> dict[str, tuple[int, int, int]]:
    if shallow is None:
        return {}
    v = manifest.model.vision
    depths = {"decoder": (manifest.model.decoder.num_layers, shallow, REAL_DECODER_LAYERS)}
    return depths if v is None else depths | {"encode": (v.used_layers, shallow, REAL_TOWER_LAYERS)}


def _contenders(
    against: str | None, ours: Contender, manifest: Manifest, layers: int | None, stack: ExitStack, console: Console
) -> list[Contender]:
    """Ours, and the other engine in each of its settings; the first `layers` layers only, or all."""
    if against is None and layers is None:
        return [ours]
    with needs_extra("export"):
        from phisight.export.shallow import write_shallow
        from phisight.export.transcription import shallow_config, transcribe
    folder, whole = _temporary(stack), ours.directory
    if layers is not None:
        cut = folder / "onnx"
        cut.mkdir()
        write_shallow(whole, cut, layers)
        ours = replace(ours, directory=cut, config=shallow_config(ours.config, layers))
    contenders = [ours]
    if against == "openvino":
        text_only = replace(ours.config, vision=None)
        contenders.append(replace(ours, name="OpenVINO", engine="openvino", config=text_only))
    if against == "llama.cpp":
        total = sum(entry.weights for entry in manifest.tensors.values())
        with console.progress("writing GGUF", total, "w") as bar:
            transcribe(whole, folder, layers=layers, progress=bar.add)
        contenders += [
            replace(ours, name=name, engine="llama.cpp", directory=folder, repack=repack, flash=flash)
            for name, repack, flash in VARIANTS
            if repack or ours.device == "cpu"
        ]
    return contenders


def _k_quants(path: str, ours: Contender, stack: ExitStack, console: Console) -> Contender:
    """llama.cpp on Q4_K_M of the checkpoint. Raises InputError for another model's, and what an export raises."""
    with needs_extra("export"):
        from phisight.export.checkpoint import Checkpoint
        from phisight.export.convert import export_gguf, plan_gguf
        from phisight.export.gguf_plan import GgufOptions
        from phisight.export.transcription import TEXT
    checkpoint = Checkpoint.open(checkpoint_directory(path))
    if checkpoint.config != ours.config:
        raise InputError(f"--checkpoint {path} has another configuration than MODEL: give the one it was made of")
    folder = _temporary(stack) / "model"
    plan = plan_gguf(checkpoint, GgufOptions(decoder="Q4_K_M", onnx_vision="none"))
    with console.progress("writing Q4_K_M", plan.total_weights(), "w") as bar:
        export_gguf(checkpoint, plan, folder, progress=bar.add)
    (folder / "model-q4_k_m.gguf").rename(folder / TEXT)
    text_only = replace(ours.config, vision=None)  # its tower is the one that is timed already
    name = "llama.cpp Q4_K_M"
    return replace(ours, name=name, engine="llama.cpp", directory=folder, config=text_only, same_weights=False)


def _temporary(stack: ExitStack) -> Path:
    # On Windows files that an ended process held may not be free at once.
    folder = tempfile.TemporaryDirectory(prefix="phisight-bench-", ignore_cleanup_errors=True)
    return Path(stack.enter_context(folder))


def _timed(contenders: Sequence[Contender], stages: Sequence[Stage], runs: int, console: Console) -> Samples:
    timed = sum(stage.kind not in ("load", "second_question") for stage in stages)
    with console.progress("timing", len(contenders) * (1 + timed * (runs + 1)), "run", scale=False) as bar:

        def done(what: str) -> None:
            bar.tell(what)
            bar.add(1)

        return measure(contenders, stages, runs, done)


def _lines(report: Mapping[str, Any]) -> list[str]:
    bounds = report["bounds"]
    products = "float16" if "float16_operations_per_second" in bounds else "integer"
    lines = [
        f"{report['device']}, {report['threads']} threads; reads {bounds['read_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{bounds[f'{products}_operations_per_second'] / 1e9:,.0f} billion {products} operations/s"
    ]
    lines.append(f"{'stage':<34}{'ours':>11}{'default':>11}{'best':>11}{'ratio':>8}{'to best':>9}{'of bound':>10}")
    for name, row in report["stages"].items():
        lines.append(_line(name, row))
        for other, seconds in row.get("other_weights", {}).items():
            lines.append(f"  {other}: {seconds:.4f} s, {seconds / row['ours_s']:.2f} times ours")
        if row.get("extrapolated"):
            lines.append(_line(f"  with {row['extrapolated']['layers']} layers", row["extrapolated"]))
        if "share_of_first" in row:
            lines.append(f"  {100 * row['share_of_first']:.1f} % of the first question's {row['first_s']:.3f} s")
    for name, peak in report["memory"].items():
        if peak is not None:
            lines.append(f"memory of {name}: {peak / 2**20:,.0f} MiB")
    return lines


def _line(name: str, row: Mapping[str, Any]) -> str:
    def seconds(key: str) -> str:
        value = row.get(key)
        return "" if value is None else f"{value:.4f} s"

    def ratio(key: str) -> str:
        value = row.get(key)
        return "" if value is None else f"{value:.2f}"

    share = row.get("share")
    return (
        f"{name:<34}{seconds('ours_s'):>11}{seconds('other_default_s'):>11}{seconds('other_s'):>11}"
        f"{ratio('ratio_default'):>8}{ratio('ratio'):>9}{'' if share is None else f'{100 * share:.0f} %':>10}"
    )
