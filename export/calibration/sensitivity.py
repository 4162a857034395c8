"""How much divergence each matrix brings when it alone is quantised: measured for one type, reckoned for the others.

    held-out data -> layer 0 -> layer 1 -> ... -> logits, the checkpoint's
                        `-> for each matrix, quantised: a stream of its own -> ... -> logits -> KL divergence

Each matrix sends a stream of its own through all later layers, so that what is measured is the divergence of the final
distribution at the positions that count, not an error within the network. All streams pass a layer while its weights
are at hand: of a checkpoint of any size one layer and one sequence are in memory, and the streams lie in two files
(4 bytes x hidden x positions x matrices each: up to 13 GB for the 15B model and 4096 positions).

A second type needs no second stream. To second order the divergence is quadratic in the error of the matrix's outputs
(its Fisher matrix does not depend on the type), so it goes as `trace(D H D^T)`, D the error of the weights, H the
second moments of the inputs; only the ratio of two types' errors is used, on a sample of rows. Dettmers and Zettlemoyer
(https://arxiv.org/abs/2212.09720) and HAWQ-V2 (https://arxiv.org/abs/1911.03852) rest on the same expansion, but
estimate the curvature; here the one stream measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phisight.backends.ort_session import SessionSettings
from phisight.config import DecoderConfig
from phisight.errors import PhisightError
from phisight.export.calibration.held_out import HeldOut
from phisight.export.calibration.layer_graph import LAYER
from phisight.export.calibration.mapped import MappedWeights
from phisight.export.calibration.run import LayerInputs
from phisight.export.calibration.streams import Ending, Streams
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import EMBEDDINGS, HEAD, decoder_layer
from phisight.export.parallel import Progress, in_parallel, naming
from phisight.quant.allocation import Choice
from phisight.quant.methods.base import InputStatistics, row_errors
from phisight.quant.stored_types import Restorer, StoredType

__all__ = ["Sensitivity", "SensitivityMeter"]

MEASURED = "sensitivities"
MATRICES = 4
"""Of a layer."""
SAMPLE = 512
"""Rows of a matrix on which types are told apart."""


@dataclass(frozen=True)
class Sensitivity:
    """Of one matrix: the divergence that its first type brings, and each type's error relative to the first's."""

    kld: float
    errors: Mapping[str, float]

    def choices(self, types: Sequence[StoredType], shape: tuple[int, ...]) -> list[Choice]:
        return [Choice(each.label, each.stored_bytes(shape), self.kld * self.errors[each.label]) for each in types]


class SensitivityMeter:
    """A consumer of calibration, which gives it each layer's statistics. `types` are those of each matrix.

    The first type of each is measured. After a kill it goes on with the layer at which it was.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        types: Mapping[str, Sequence[StoredType]],
        held_out: HeldOut,
        folder: Path,
        settings: SessionSettings,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._types = types
        self._folder = folder
        self._streams = Streams(checkpoint, held_out, folder, settings, progress)
        self.sensitivities: dict[str, Sensitivity] = {}

    def __call__(self, layer: LayerInputs) -> None:
        """Raises CheckpointError that names the weight, EngineError, PhisightError."""
        if layer.index == 0:
            restore, errors = self._prepared(EMBEDDINGS, None)
            self._keep("embeddings", {EMBEDDINGS: errors})
            self._streams.begin(restore)
        if layer.advances:
            self._pass(layer)
        else:
            self._finish(layer)

    @staticmethod
    def work(layers: int, positions: int) -> int:
        """What `progress` will count."""
        return positions * sum(2 + MATRICES * (index + 1) for index in range(layers))

    @staticmethod
    def disk(decoder: DecoderConfig, positions: int) -> int:
        """Bytes that the streams take at most, behind the last layer and before it."""
        return 4 * decoder.hidden_size * positions * (4 + MATRICES * (2 * decoder.num_layers - 1))

    def _pass(self, layer: LayerInputs) -> None:
        """The streams of all matrices before this layer, and one more for each of its own."""
        streams, errors = self._streams, {}
        old = decoder_layer(layer.index)
        before = 2 + len(streams.matrices) * layer.index
        probes = MappedWeights(streams.folder / "probes.f32", self._checkpoint, streams.matrices)
        with streams.layer(layer.index) as weights, probes:
            for name in streams.matrices:
                weight = name.replace(LAYER, old, 1)
                restore, errors[weight] = self._prepared(weight, layer.statistics.pop(weight))
                at = 0
                with naming(weight):
                    for rows in in_parallel(restore, self._checkpoint.tensors[weight].chunks()):
                        probes.replace(name, rows, at)
                        at += len(rows)
                del restore  # and with it the Hessian, before the next one is worked on
            runs = [(number, weights.arrays) for number in range(before)]
            runs += [(0, {**weights.arrays, name: probes.arrays[name]}) for name in streams.matrices]
            streams.advance(layer.index, runs)
        self._keep(f"layer-{layer.index}", errors)

    def _finish(self, layer: LayerInputs) -> None:
        restore, errors = self._prepared(HEAD, layer.statistics.pop(HEAD))
        names = [EMBEDDINGS]
        found = {EMBEDDINGS: self._kept("embeddings")[EMBEDDINGS], HEAD: errors}
        for index in range(layer.index):
            here = self._kept(f"layer-{index}")
            found |= here
            names += here
        head = self._checkpoint.tensors[HEAD]
        endings = [Ending(number) for number in range(1, len(names) + 1)]
        judged = self._streams.judge([*endings, Ending(0, lambda: in_parallel(restore, head.chunks()))])
        for name, positions in zip([*names, HEAD], judged, strict=True):
            self.sensitivities[name] = Sensitivity(float(positions.kld.mean()), found[name])
        kept = {name: {"kld": each.kld, "errors": each.errors} for name, each in self.sensitivities.items()}
        self._file(MEASURED).write_text(json.dumps(kept), encoding="utf-8")

    def take_up(self) -> None:
        """The sensitivities of a run that had come to its end. Raises PhisightError if they are gone."""
        self.sensitivities = {name: Sensitivity(**each) for name, each in self._kept(MEASURED).items()}

    def _prepared(self, name: str, statistics: InputStatistics | None) -> tuple[Restorer, dict[str, float]]:
        """What the first type makes of rows, and the errors of all, relative to the first's."""
        source = self._checkpoint.tensors[name]
        step = -(-source.shape[0] // SAMPLE)
        sample = np.concatenate([source.rows(row, row + 1) for row in range(0, source.shape[0], step)])
        errors: dict[str, float] = {}
        restore: Restorer | None = None
        with naming(name):
            for each in reversed(self._types[name]):
                restore = None  # one Hessian's factor at a time: of 17920 columns it takes 1.2 GiB
                restore = each.restorer(statistics)
                errors[each.label] = float(row_errors(sample, restore(sample), statistics).sum())
        assert restore is not None
        measured = errors[self._types[name][0].label]
        return restore, {label: error / measured if measured else 0.0 for label, error in errors.items()}

    def _keep(self, stage: str, errors: Mapping[str, Mapping[str, float]]) -> None:
        self._file(stage).write_text(json.dumps(errors), encoding="utf-8")

    def _kept(self, stage: str) -> dict[str, dict[str, Any]]:
        try:
            found: dict[str, dict[str, Any]] = json.loads(self._file(stage).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PhisightError(
                f"{self._file(stage)} cannot be read ({error}): remove {self._folder.parent} and measure again"
            ) from None
        return found

    def _file(self, stage: str) -> Path:
        return self._folder / f"{stage}.json"
