"""Calibration: a checkpoint's layers one after the other, all data through each, its statistics handed on.

    data -> embeddings and image features -> layer 0 -> layer 1 -> ... -> norm before the head
                                               |          |                 |
                                           statistics -> consumer -> quantised weights, which later layers may see

In memory are one layer's Hessians (1.5 GiB at the real width, or none) and one sequence's activations. Weights of the
layer and activations at its boundary lie in files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort_session import SessionSettings, integer_products
from phisight.errors import CheckpointError, InputError, PhisightError
from phisight.export.calibration.data import CalibrationData
from phisight.export.calibration.inputs import write_inputs
from phisight.export.calibration.layer_graph import LAYER, LayerGraph, build_final_norm, build_layer
from phisight.export.calibration.mapped import MappedWeights
from phisight.export.calibration.statistics import GatheredSum
from phisight.export.calibration.work import WorkDirectory
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import decoder_layer
from phisight.export.parallel import Progress
from phisight.quant.methods.base import InputStatistics

__all__ = ["Calibration", "CalibrationOptions", "Consumer", "LayerInputs"]


@dataclass(frozen=True)
class CalibrationOptions:
    """`image_token_weight` is what an image token counts in the statistics where a text token counts 1.

    hessians: whether consumers get them. purpose: what the consumer makes of the statistics; a run is taken up only by
    one of the same purpose. threads: of the engine.
    """

    image_token_weight: float = 1.0
    hessians: bool = False
    purpose: str = ""
    threads: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.image_token_weight < float("inf")):
            raise InputError(f"image_token_weight is {self.image_token_weight}: give a number from 0 up, such as 1")


@dataclass(frozen=True)
class LayerInputs:
    """What went into the linear layers of decoder layer `index`, by the names of their weights.

    The stage behind the last layer, `index` the number of layers, has the head alone. Statistics may be popped, which
    gives the memory of a Hessian back. Where there is a layer behind this one, `advances`, it sees other weights (rows,
    columns) of this layer, or another vector of its norms, after `replace(name, rows, start)`, which writes rows from
    `start` on and raises KeyError, or ValueError for another width.
    """

    index: int
    statistics: dict[str, InputStatistics]
    advances: bool
    replace: Callable[[str, NDArray[np.float32], int], None]


Consumer = Callable[[LayerInputs], None]
"""Called once for each stage, in order.

After a kill it is called again for the stages that were not finished, so what it keeps it must be able to overwrite.
"""


class Calibration:
    """One calibration in a work directory, which a second object with the same arguments takes up where it stopped."""

    def __init__(self, checkpoint: Checkpoint, data: CalibrationData, work: Path, options: CalibrationOptions) -> None:
        """Raises InputError for a work directory that belongs to something else."""
        self.checkpoint = checkpoint
        self.data = data
        self.options = options
        self._settings = SessionSettings(threads=options.threads, products=integer_products())
        self._stages = checkpoint.config.decoder.num_layers + 1
        self._work = WorkDirectory(work, _identity(checkpoint, data, options), checkpoint.config.decoder.hidden_size)

    @property
    def work_left(self) -> int:
        """What `run` will count in its progress: positions, once for each stage and once for the embeddings."""
        done = 0 if self._work.boundary is None else self._work.boundary + 1
        return (self._stages + 1 - done) * self.data.positions

    def run(self, consumer: Consumer = lambda layer: None, progress: Progress = lambda positions: None) -> None:
        """Go through all stages that are left. Raises CheckpointError, EngineError, PhisightError for a full disk."""
        try:
            self._run(consumer, progress)
        except OSError as error:
            raise PhisightError(
                f"calibrating in {self._work.path} failed: {error.strerror or error}: make room and run it again"
            ) from error

    def as_json(self) -> dict[str, Any]:
        """For the manifest: the data, what an image token counted, and which parts of the model were calibrated.

        Others that are quantised, such as the vision tower, were rounded to the nearest.
        """
        parts = ["decoder", "head"]
        return {**self.data.as_json(), "image_token_weight": self.options.image_token_weight, "parts": parts}

    def moments(self) -> dict[str, InputStatistics]:
        """Second moments of every linear layer's inputs after `run`, without Hessians. Raises PhisightError."""
        return {name: each for stage in range(self._stages) for name, each in self._work.moments(stage).items()}

    def _run(self, consumer: Consumer, progress: Progress) -> None:
        work = self._work
        if work.boundary is None:
            write_inputs(self.checkpoint, self.data, work, self._settings, progress)
        last = self._stages - 1
        if work.boundary is not None and work.boundary < last:
            graph = build_layer(self.checkpoint.config, work.path, self._settings)
            with MappedWeights(work.path / "weights.f32", self.checkpoint, graph.weights) as weights:
                for stage in range(work.boundary, last):
                    weights.load(LAYER, decoder_layer(stage))
                    self._stage(stage, graph, weights, consumer, progress)
        if work.boundary == last:
            graph = build_final_norm(self.checkpoint.config, work.path, self._settings)
            with MappedWeights(work.path / "norm.f32", self.checkpoint, graph.weights) as weights:
                weights.load("", "")
                self._stage(last, graph, weights, consumer, progress)
            work.reached(self._stages)

    def _stage(
        self, stage: int, graph: LayerGraph, weights: MappedWeights, consumer: Consumer, progress: Progress
    ) -> None:
        sums = {name: GatheredSum(weights.columns(name), hessian=self.options.hessians) for name in graph.observed}
        self._pass(stage, graph, weights, sums, progress)
        replaced = self._consume(stage, sums, weights, consumer)
        if graph.advances:
            if replaced:
                self._pass(stage, graph, weights, None, lambda positions: None)
            self._work.reached(stage + 1)

    def _consume(self, stage: int, sums: dict[str, GatheredSum], weights: MappedWeights, consumer: Consumer) -> bool:
        """Keep the moments, hand the statistics on. Whether weights were replaced."""
        statistics = {}
        for name in tuple(sums):
            weight = name.replace(LAYER, decoder_layer(stage), 1)
            try:
                statistics[weight] = sums.pop(name).finish()
            except InputError as error:
                raise CheckpointError(f"the inputs of {weight}: {error}") from None
        self._work.save_moments(stage, statistics)
        replaced = False

        def replace(name: str, rows: NDArray[np.float32], start: int) -> None:
            nonlocal replaced
            weights.replace(name.replace(decoder_layer(stage), LAYER, 1), rows, start)
            replaced = True

        consumer(LayerInputs(stage, statistics, stage + 1 < self._stages, replace))
        return replaced

    def _pass(
        self,
        stage: int,
        graph: LayerGraph,
        weights: MappedWeights,
        sums: Mapping[str, GatheredSum] | None,
        progress: Progress,
    ) -> None:
        """All sequences through a stage: the next boundary is written, `sums` get what the linear layers get."""
        source = self._work.open(stage)
        target = self._work.create(stage + 1) if graph.advances else None
        at = 0
        for sequence in self.data.sequences:
            count = len(sequence)
            following, seen = graph.run(source.read(at, count), weights.arrays, observe=sums is not None)
            if target is not None and following is not None:
                target.write(at, following)
            if sums is not None:
                token_weights = np.where(sequence.is_image(), self.options.image_token_weight, 1).astype(np.float32)
                for name, x in seen.items():
                    sums[name].add(x, token_weights)
            at += count
            progress(count)
        source.close()
        if target is not None:
            target.close()


def _identity(checkpoint: Checkpoint, data: CalibrationData, options: CalibrationOptions) -> str:
    """What the statistics depend on, hashed: configuration, a sample of every tensor, the data, the options."""
    state = hashlib.sha256()
    chosen = [options.image_token_weight, options.hessians, options.purpose]
    parts = [asdict(checkpoint.config), data.digest, chosen]
    state.update(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in checkpoint.tensors.items():
        if tensor.spec.part != "unused":
            state.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
            state.update(tensor.rows(0, 1).tobytes())  # a first row tells fine-tuned checkpoints apart
    return state.hexdigest()
