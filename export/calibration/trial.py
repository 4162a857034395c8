"""What a whole plan really costs: the decoder with every matrix as it will be stored, on held-out data.

Sums of single divergences leave out what errors make of each other; this does not. It takes two streams through the
layers, so next to the sensitivities it costs nothing. The tower and the rounding of activations are no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort_session import SessionSettings
from phisight.compare.metrics import Divergence, Positions
from phisight.export.calibration.held_out import HeldOut
from phisight.export.calibration.layer_graph import LAYER
from phisight.export.calibration.mapped import MappedWeights
from phisight.export.calibration.streams import Ending, Streams
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import EMBEDDINGS, FINAL_NORM, HEAD, decoder_layer
from phisight.export.parallel import Progress, in_parallel, naming
from phisight.export.quantized import QuantizedWeights
from phisight.quant.blocks import dequantize_blocks
from phisight.quant.methods.base import InputStatistics
from phisight.quant.stored_types import BlockType, StoredType

__all__ = ["PlannedWeights", "plan_divergence", "plan_positions", "trial_work"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PlannedWeights:
    """What the files will hold. `types` has the matrices' types, `quantized` what a method made of them already.

    `statistics` weigh the errors of the others.
    """

    checkpoint: Checkpoint
    types: Mapping[str, StoredType]
    quantized: QuantizedWeights | None
    statistics: Mapping[str, InputStatistics]

    def rows(self, name: str) -> Iterator[Floats]:
        """All rows of a matrix, some at a time. Raises CheckpointError that names it."""
        source, kind = self.checkpoint.tensors[name], self.types[name]
        with naming(name):
            if isinstance(kind, BlockType) and self.quantized is not None and name in self.quantized:
                yield from map(dequantize_blocks, self.quantized.blocks(name, source.shape[1], kind.scheme))
            else:
                yield from in_parallel(kind.restorer(self.statistics.get(name)), source.chunks())

    def vector(self, name: str) -> Floats | None:
        """A norm's vector if it is not the checkpoint's."""
        return None if self.quantized is None else self.quantized.vector(name)


def plan_divergence(
    weights: PlannedWeights, held_out: HeldOut, folder: Path, settings: SessionSettings, progress: Progress
) -> Divergence:
    """The divergence of the planned decoder from the checkpoint's. Raises CheckpointError, EngineError."""
    return Divergence.of(plan_positions(weights, held_out, folder, settings, progress))


def plan_positions(
    weights: PlannedWeights, held_out: HeldOut, folder: Path, settings: SessionSettings, progress: Progress
) -> Positions:
    """The same, position by position: those of two plans belong together."""
    checkpoint = weights.checkpoint
    streams = Streams(checkpoint, held_out, folder, settings, progress)
    streams.begin(weights.types[EMBEDDINGS].restorer(None))
    for index in range(checkpoint.config.decoder.num_layers):
        planned = MappedWeights(folder / "planned.f32", checkpoint, streams.weights)
        with streams.layer(index) as own, planned:
            planned.load(LAYER, decoder_layer(index))
            for name in streams.weights:
                _plan(weights, planned, name, name.replace(LAYER, decoder_layer(index), 1))
            streams.advance(index, [(0, own.arrays), (1, planned.arrays)])
    ending = Ending(1, lambda: weights.rows(HEAD), weights.vector(FINAL_NORM))
    return streams.judge([ending])[0]


def trial_work(layers: int, positions: int) -> int:
    """What `progress` will count."""
    return 2 * layers * positions


def _plan(weights: PlannedWeights, planned: MappedWeights, name: str, source: str) -> None:
    if source not in weights.types:
        if (vector := weights.vector(source)) is not None:
            planned.replace(name, vector)
        return
    at = 0
    for rows in weights.rows(source):
        planned.replace(name, rows, at)
        at += len(rows)
