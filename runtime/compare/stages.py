"""The finer stages of a model, each of which may be taken from a variant while all others are the reference's.

Tower, projector, layers and head lie inside ONNX graphs, which have to be joined to tell them apart. That is the work
of a `Mixer`, which needs the exporter's packages; llama.cpp's graphs cannot be cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from phisight.compare.subjects import Subject
from phisight.config import ModelConfig

__all__ = ["KV_CACHE", "FineStage", "Mixer", "can_be_mixed", "fine_stages"]

MOST_GROUPS = 8
"""Groups of decoder layers."""
KV_CACHE = "KV cache"
"""Exchanged by opening the reference itself with the variant's type of cache."""


@dataclass(frozen=True)
class FineStage:
    """Its name in the report, the graph that it lies in, and the stages there that are taken."""

    name: str
    file: Literal["vision.onnx", "decoder.onnx"]
    taken: frozenset[str]


class Mixer(Protocol):
    def __call__(self, reference: Subject, variant: Subject, stage: FineStage, out: Path) -> None:
        """Make the model directory `out`. Raises InputError where both cannot be joined, PhisightError."""


def fine_stages(config: ModelConfig) -> list[FineStage]:
    """In the order of the flow; layers in up to eight groups."""
    layers = config.decoder.num_layers
    groups = min(layers, MOST_GROUPS)
    cuts = [number * layers // groups for number in range(groups + 1)]
    stages = []
    if config.vision is not None:
        stages = [FineStage(name, "vision.onnx", frozenset({name})) for name in ("tower", "projector")]
    for start, stop in pairwise(cuts):
        name = f"layer {start}" if stop == start + 1 else f"layers {start}-{stop - 1}"
        stages.append(FineStage(name, "decoder.onnx", frozenset(map(str, range(start, stop)))))
    return [*stages, FineStage("head", "decoder.onnx", frozenset({"head"}))]


def can_be_mixed(reference: Subject, variant: Subject) -> bool:
    """Whether both are made of ONNX graphs."""
    return all(subject.format in ("onnx", "checkpoint") for subject in (reference, variant))
