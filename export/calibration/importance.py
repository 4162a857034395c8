"""An importance matrix for llama.cpp from a calibration, under the names of the GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

from phisight.export.calibration.data import CalibrationData
from phisight.export.names import gguf_name
from phisight.quant.imatrix import ImportanceMatrix
from phisight.quant.methods.base import InputStatistics

__all__ = ["importance_matrix"]


def importance_matrix(moments: Mapping[str, InputStatistics], data: CalibrationData) -> ImportanceMatrix:
    """`moments` by the checkpoint's names, as `Calibration.moments` has them. The head is among them.

    llama.cpp shows the data sets' names: here they say what each source contributed.
    """
    datasets = tuple(
        f"phisight {source.name}: {source.text_tokens} text tokens, {source.image_tokens} of {source.pictures} pictures"
        for source in data.sources
    )
    return ImportanceMatrix.of({gguf_name(name): each for name, each in moments.items()}, datasets)
