"""What the decoder reads: embeddings of tokens and the tower's features of pictures, spliced as the runtime does it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from phisight.backends.ort import OrtVisionEncoder
from phisight.backends.ort_session import SessionSettings
from phisight.export.calibration.data import CalibrationData, CalibrationSequence
from phisight.export.calibration.work import WorkDirectory
from phisight.export.checkpoint import Checkpoint
from phisight.export.names import EMBEDDINGS
from phisight.export.onnx_vision import build_vision
from phisight.export.onnx_writer import write_graph
from phisight.export.output import OutputDirectory
from phisight.export.parallel import Progress
from phisight.export.plan import ExportOptions, make_plan
from phisight.quant.stored_types import Restorer
from phisight.sequence import ImageFeatures, splice

__all__ = ["embedded", "write_inputs"]


def write_inputs(
    checkpoint: Checkpoint, data: CalibrationData, work: WorkDirectory, settings: SessionSettings, progress: Progress
) -> None:
    """Write the inputs of the first layer. The tower runs in float32, exported for the time that it takes.

    Raises CheckpointError, EngineError.
    """
    pictured = any(sequence.images for sequence in data.sequences)
    encoder = _encoder(checkpoint, work, settings) if pictured else None
    boundary = work.create(0)
    at = 0
    for sequence in data.sequences:
        for rows in _rows(checkpoint, sequence, encoder):
            boundary.write(at, rows)
            at += len(rows)
        progress(len(sequence))
    boundary.close()
    work.reached(0)
    del encoder  # before its file: Windows removes none that is open
    shutil.rmtree(work.path / "tower", ignore_errors=True)


def _rows(
    checkpoint: Checkpoint, sequence: CalibrationSequence, encoder: OrtVisionEncoder | None
) -> Iterator[NDArray[np.float32]]:
    """(n, hidden) for each stretch of text and each picture."""
    decoder = checkpoint.config.decoder
    features = [ImageFeatures(image.digest, encoder.encode(image)) for image in sequence.images] if encoder else []
    spliced = splice(sequence.ids, features, vocab_size=decoder.vocab_size, hidden_size=decoder.hidden_size)
    for stretch in spliced.stretches:
        yield embedded(checkpoint, stretch) if stretch.ndim == 1 else stretch.astype(np.float32, copy=False)


def embedded(
    checkpoint: Checkpoint, ids: NDArray[np.generic], restore: Restorer = lambda rows: rows
) -> NDArray[np.float32]:
    """(n,) -> (n, hidden), `restore` turning rows of the checkpoint's table into those of another."""
    table = checkpoint.tensors[EMBEDDINGS]
    unique, places = np.unique(ids, return_inverse=True)
    return restore(np.concatenate([table.rows(int(id_), int(id_) + 1) for id_ in unique]))[places]


def _encoder(checkpoint: Checkpoint, work: WorkDirectory, settings: SessionSettings) -> OrtVisionEncoder:
    config = checkpoint.config
    if config.vision is None:
        raise ValueError("a text-only checkpoint has no tower")
    folder = work.path / "tower"
    folder.mkdir(exist_ok=True)
    plan = make_plan(config, ExportOptions(decoder="f32", vision="f32"))
    graph, jobs = build_vision(config.vision, config.decoder.hidden_size, plan, "vision.onnx.data")
    write_graph(graph, jobs, checkpoint, OutputDirectory(folder), lambda weights: None)
    return OrtVisionEncoder(folder, settings, config.decoder.hidden_size)
