"""Streams of activations through the decoder side by side: the checkpoint's, and others with some weights changed.

A file holds all streams at a layer boundary, each (positions, hidden) float32, the checkpoint's own first. In memory is
one sequence of one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort_session import SessionSettings
from phisight.compare.metrics import Positions, positions_of
from phisight.export.calibration.held_out import HeldOut
from phisight.export.calibration.layer_graph import LAYER, LayerGraph, build_final_norm, build_layer
from phisight.export.calibration.mapped import MappedWeights
from phisight.export.calibration.work import Boundary
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import FINAL_NORM, HEAD, decoder_layer
from phisight.export.parallel import Progress
from phisight.quant.stored_types import Restorer

__all__ = ["Ending", "Streams"]

Floats = NDArray[np.float32]
Weights = Mapping[str, Floats]


@dataclass(frozen=True)
class Ending:
    """A stream behind the last layer, and what follows it: rows of the head, and the last norm's vector, if not the
    checkpoint's.
    """

    stream: int
    head: Callable[[], Iterable[Floats]] | None = None
    norm: Floats | None = None


class Streams:
    """The streams of held-out data in a folder. `progress` counts positions of a stream, once a layer."""

    def __init__(
        self, checkpoint: Checkpoint, held_out: HeldOut, folder: Path, settings: SessionSettings, progress: Progress
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._checkpoint = checkpoint
        self._held_out = held_out
        self._settings = settings
        self._progress = progress
        self._graph: LayerGraph | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of a layer's weights, as of layer 0."""
        return self._layer().weights

    @property
    def matrices(self) -> tuple[str, ...]:
        """Those of the linear layers, in the order in which they work."""
        return tuple(self._layer().observed)

    def begin(self, *tables: Restorer) -> None:
        """The boundary before the first layer: the checkpoint's embeddings, and a stream for each other table."""
        inputs = self._held_out.inputs(self._checkpoint, self.folder / "inputs", self._settings)
        with self._open(0, new=True) as target:
            for start, count in self._sequences():
                target.write(start, inputs.read(start, count))
            for number, restore in enumerate(tables, 1):
                at = number * self._held_out.positions
                self._held_out.with_embeddings(self._checkpoint, inputs, target, at, restore)
        inputs.close()

    @contextmanager
    def layer(self, index: int) -> Iterator[MappedWeights]:
        """The checkpoint's weights of a layer, under the names of layer 0."""
        with MappedWeights(self.folder / "layer.f32", self._checkpoint, self.weights) as mapped:
            mapped.load(LAYER, decoder_layer(index))
            yield mapped

    def advance(self, index: int, runs: Sequence[tuple[int, Weights]]) -> None:
        """Through layer `index`: a new stream for each run, from an old stream and weights. What lies before goes."""
        positions = self._held_out.positions
        graph = self._layer()
        with self._open(index) as source, self._open(index + 1, new=True) as target:
            for number, (stream, weights) in enumerate(runs):
                for start, count in self._sequences():
                    x = source.read(stream * positions + start, count)
                    following, _ = graph.run(x, dict(weights), observe=False)
                    assert following is not None
                    target.write(number * positions + start, following)
                    self._progress(count)
        for earlier in range(index):  # the one before may be needed again after a kill
            self._path(earlier).unlink(missing_ok=True)

    def judge(self, endings: Sequence[Ending]) -> list[Positions]:
        """Each ending against the checkpoint's own, at the positions that count. Raises EngineError."""
        last = self._checkpoint.config.decoder.num_layers
        graph = build_final_norm(self._checkpoint.config, self.folder, self._settings)
        own = self._checkpoint.tensors[FINAL_NORM].load()
        head = self._checkpoint.tensors[HEAD]
        found: list[list[Positions]] = [[] for _ in endings]
        with self._open(last) as boundary:
            for spans in self._held_out.batches():

                def logits(ending: Ending, spans: list[tuple[int, int]] = spans) -> Floats:
                    at = ending.stream * self._held_out.positions
                    rows = np.concatenate([boundary.read(at + start, stop - start) for start, stop in spans])
                    normed = graph.run(rows, {FINAL_NORM: own if ending.norm is None else ending.norm})[1][HEAD]
                    chunks = head.chunks() if ending.head is None else ending.head()
                    return np.concatenate([normed @ part.T for part in chunks], axis=1)

                right = logits(Ending(0))
                for ending, parts in zip(endings, found, strict=True):
                    parts.append(positions_of(right, logits(ending), right.argmax(axis=-1)))
        return [Positions.joined(parts) for parts in found]

    def _layer(self) -> LayerGraph:
        if self._graph is None:
            self._graph = build_layer(self._checkpoint.config, self.folder, self._settings)
        return self._graph

    def _sequences(self) -> Iterator[tuple[int, int]]:
        at = 0
        for sequence in self._held_out.data.sequences:
            yield at, len(sequence)
            at += len(sequence)

    @contextmanager
    def _open(self, index: int, *, new: bool = False) -> Iterator[Boundary]:
        boundary = Boundary(self._path(index), self._checkpoint.config.decoder.hidden_size, new=new)
        try:
            yield boundary
        finally:
            boundary.close()

    def _path(self, index: int) -> Path:
        return self.folder / f"streams-{index}.f32"
