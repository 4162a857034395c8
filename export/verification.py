"""An exported model against its checkpoint: some rows of every tensor, restored, beside the source's.

The error is ||stored - source|| / ||source|| over these rows. What a type allows is measured, not tabled: the same rows
are rounded once more and restored, and the stored ones may be off by 1 % more than that, or by twice as much where a
method chose them by what the layers see instead of by the nearest number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError
from phisight.export.checkpoint import Checkpoint
from phisight.export.gguf_plan import BLOCK_SCHEMES
from phisight.export.names import expected_tensors
from phisight.export.plan import SCALING_METHODS
from phisight.export.stored_tensors import open_stored
from phisight.manifest import Manifest, TensorEntry
from phisight.quant.blocks import dequantize_channels, quantize_channels
from phisight.quant.floats import to_float_type
from phisight.quant.methods.rtn import RoundToNearest
from phisight.quant.scheme import SCHEMES, BlockScheme, ChannelScheme, FloatType
from phisight.quant.stored_types import BlockType, GgmlType

__all__ = ["TensorCheck", "compare_with_checkpoint"]

Floats = NDArray[np.float32]
ROWS = 32
"""Of each matrix, spread from its first to its last."""
VALUES = 1 << 16
"""Of each vector, at most."""
SLACK, METHOD_SLACK = 1.01, 2.0


@dataclass(frozen=True)
class TensorCheck:
    """A tensor by its name in the manifest: relative error, and what its scheme allows.

    `scaled` are weights whose rows and columns a method multiplied: the error is what no such factors explain.
    """

    name: str
    scheme: str
    error: float
    allowed: float
    scaled: bool = False

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def compare_with_checkpoint(directory: Path, checkpoint: Checkpoint) -> Iterator[TensorCheck]:
    """Check every tensor of the manifest, in its order.

    Raises ModelDirError for a damaged directory, InputError for a checkpoint of another shape, or for a directory
    whose types are not known here, EngineError where a type needs ggml's quantiser and it is missing.
    """
    manifest = Manifest.read(directory)
    if manifest.model != checkpoint.config:
        raise InputError(
            f"{directory} is not of the shape of {checkpoint.directory}: give the checkpoint it was made of"
        )
    specs, stored = expected_tensors(manifest.model), open_stored(directory, manifest)
    for label, entry in manifest.tensors.items():
        spec = specs[label.removeprefix("vision.onnx/")]
        step = ROWS if len(spec.shape) > 1 else VALUES
        rows = np.unique(np.linspace(0, spec.shape[0] - 1, min(step, spec.shape[0])).astype(np.intp))
        tensor = checkpoint.tensors[spec.name]
        if len(spec.shape) > 1:
            source = np.concatenate([tensor.rows(row, row + 1) for row in rows.tolist()])
        else:
            source = tensor.load()[rows]
        found = stored[entry.part].rows(spec, entry, rows)
        chosen = entry.part in ("decoder", "head") and _is_chosen(manifest)
        allowed = _error(_restored(source, entry, label), source) * (METHOD_SLACK if chosen else SLACK) + 1e-7
        scaled = entry.part == "decoder" and manifest.options.get("method") in SCALING_METHODS
        error = _error(_unscaled(found, source) if scaled else found, source)
        yield TensorCheck(label, entry.scheme, error, allowed, scaled)


def _is_chosen(manifest: Manifest) -> bool:
    """Whether weights may be other than the nearest: by a method, or by an importance matrix."""
    return manifest.options.get("method", "rtn") != "rtn" or "imatrix" in manifest.options


def _restored(rows: Floats, entry: TensorEntry, label: str) -> Floats:
    """The rows as they come back from the entry's scheme. Raises InputError for one that is not known."""
    name = entry.scheme
    scheme = SCHEMES.get(name, BLOCK_SCHEMES.get(name.upper()))
    if isinstance(scheme, BlockScheme):
        return BlockType(name, scheme, RoundToNearest()).restorer(None)(rows)
    if isinstance(scheme, ChannelScheme):
        return dequantize_channels(quantize_channels(rows))
    if name in (*get_args(FloatType), "bf16"):
        return to_float_type(rows, name.upper()).astype(np.float32)
    try:
        restorer = GgmlType(name.upper(), weighed=False).restorer(None)
    except KeyError:
        raise InputError(f"{label} is stored as {name}, which cannot be compared with a checkpoint") from None
    return restorer(rows)


def _error(found: Floats, source: Floats) -> float:
    """Infinite for weights that are not finite; relative to 1 where the source is all zeros."""
    size = float(np.linalg.norm(source.astype(np.float64))) or 1.0
    error = float(np.linalg.norm(found.astype(np.float64) - source)) / size
    return error if np.isfinite(error) else float("inf")


def _unscaled(found: Floats, source: Floats) -> Floats:
    """Without factors on rows and columns, of which each is fitted in turn."""
    fitted = found.astype(np.float64).reshape(len(found), -1)
    wanted = source.astype(np.float64).reshape(len(source), -1)
    for axis in (1, 0, 1, 0) if fitted.shape[1] > 1 else (1,):
        norm = (fitted * fitted).sum(axis=axis, keepdims=True)
        fitted = fitted * ((fitted * wanted).sum(axis=axis, keepdims=True) / np.where(norm == 0, 1, norm))
    return fitted.reshape(found.shape).astype(np.float32)
