"""The engine that `--device auto` takes for an ONNX model: what `phisight bench --against openvino` found faster."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phisight.bench.stages import stages_named
from phisight.cli.cache import own_cache
from phisight.devices import DeviceChoice
from phisight.engine_times import POSITIONS, STEPS, EngineTimes, MeasuredEngines, kept_engines
from phisight.errors import InputError
from phisight.loading import model_directory
from phisight.manifest import FILE_NAME, Manifest
from phisight.model_cache import CacheIdentity, model_identity
from phisight.planner import Verdict, judge_pair, memory_bytes
from phisight.threads import choose_threads, read_threads

__all__ = ["chosen_device", "keep_measured"]

AUTO = "auto"
ONCE = ("run", "ground")
"""Commands that open a model for one question."""
PREFILL, DECODE = stages_named("prefill,decode")


def chosen_device(args: argparse.Namespace, name: str | Path) -> str | DeviceChoice:
    """The device of the command line; for "auto", and options that both engines know, what was measured.

    Raises ModelDirError.
    """
    path = model_directory(name)
    asked = args.device != AUTO or args.accuracy_level is not None or args.kv not in (None, "f32")
    if asked or args.no_cache or not (path / FILE_NAME).is_file():
        return str(args.device)
    manifest = Manifest.read(path)
    if manifest.format != "onnx" or manifest.options.get("float") == "f16":
        return AUTO
    measured = kept_engines(own_cache(), _identity(path, manifest, choose_threads(read_threads(args.threads)).count))
    return AUTO if measured is None else measured.choice(_room(manifest), once=args.command in ONCE)


def keep_measured(
    directory: Path, manifest: Manifest, threads: int, stages: Mapping[str, Mapping[str, Any]], opening: Sequence[float]
) -> DeviceChoice | None:
    """Keep what a report of `phisight bench` says of both engines, and the seconds in which they opened the model.

    What "auto" takes from now on for many questions. None: too little was measured.
    """
    if any(stages.get(stage.name, {}).get("other_s") is None for stage in (PREFILL, DECODE)):
        return None
    ours, other = (
        EngineTimes(stages[PREFILL.name][key] / PREFILL.timed_units, stages[DECODE.name][key], seconds)
        for key, seconds in zip(("ours_s", "other_s"), opening, strict=True)
    )
    measured = MeasuredEngines(ours, other)
    measured.keep(own_cache(), _identity(directory, manifest, threads))
    return measured.choice(_room(manifest))


def _room(manifest: Manifest) -> Verdict:
    """Whether both engines fit into this machine's memory. Without a size that the system tells they do not."""
    try:
        return judge_pair(manifest, POSITIONS + STEPS, memory_bytes())
    except InputError:
        return Verdict(False, "how much there is the system does not tell")


def _identity(path: Path, manifest: Manifest, threads: int) -> CacheIdentity:
    hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
    here: dict[str, object] = {"machine": platform.node(), "threads": threads}
    return model_identity(path, [path / name for name in (*hashes, FILE_NAME)], hashes, here)
