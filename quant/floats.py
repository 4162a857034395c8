"""Rounding float32 weights to the float types of files."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phisight.errors import CheckpointError

__all__ = ["to_float_type"]


def to_float_type(weights: NDArray[np.float32], name: str) -> NDArray[Any]:
    """float32 -> an array of F32, F16 or BF16 (round to nearest even), C-contiguous.

    Raises CheckpointError for weights that are not finite there.
    """
    with np.errstate(over="ignore"):
        converted: NDArray[Any] = np.ascontiguousarray(weights, _dtype(name))
    if not np.isfinite(converted).all():
        raise CheckpointError(
            f"weights reach {np.abs(weights).max()}, which {converted.dtype} cannot hold: "
            + ("the checkpoint is damaged" if name == "F32" else "export to f32, or the checkpoint is damaged")
        )
    return converted


def _dtype(name: str) -> Any:
    if name == "BF16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.float32 if name == "F32" else np.float16
