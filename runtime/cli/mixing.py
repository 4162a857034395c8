"""Joining ONNX graphs for the finer stages of `phisight compare`."""

from __future__ import annotations

from pathlib import Path

from phisight.compare.stages import FineStage, Mixer
from phisight.compare.subjects import Subject

__all__ = ["find_mixer"]


def find_mixer() -> Mixer | None:
    """None without the exporter's packages."""
    try:
        from phisight.export.mixed_graph import MixedModel
    except ModuleNotFoundError:
        return None

    def mix(reference: Subject, variant: Subject, stage: FineStage, out: Path) -> None:
        sides = reference.source.path, variant.source.path
        model = MixedModel(*sides, reference.config, reference.accuracy_level, variant.accuracy_level)
        model.write(out, stage.file, stage.taken)

    return mix
