"""The weights of the stage at work in a file that is mapped into memory, so that the system may page them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from phisight.export.checkpoint import Checkpoint

__all__ = ["MappedWeights"]


class MappedWeights:
    """Arrays by the graph's names, one after the other in a float32 file. Every layer takes the last one's place."""

    def __init__(self, path: Path, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        self._checkpoint = checkpoint
        specs = [checkpoint.tensors[name].spec for name in names]
        self._path = path
        path.unlink(missing_ok=True)
        self._file = np.memmap(path, np.float32, "w+", shape=(sum(spec.size for spec in specs),))
        self.arrays: dict[str, NDArray[np.float32]] = {}
        at = 0
        for spec in specs:
            self.arrays[spec.name] = np.asarray(self._file[at : at + spec.size]).reshape(spec.shape)
            at += spec.size

    def columns(self, name: str) -> int:
        """Inputs of the linear layer `name`, whose weight need not be one of the arrays."""
        return self._checkpoint.tensors[name].shape[1]

    def load(self, old: str, new: str) -> None:
        """Read from the checkpoint what is called by the arrays' names with the prefix `old` turned into `new`."""
        for name, array in self.arrays.items():
            at = 0
            for chunk in self._checkpoint.tensors[new + name.removeprefix(old)].chunks():
                array[at : at + len(chunk)] = chunk
                at += len(chunk)

    def replace(self, name: str, rows: NDArray[np.float32], start: int = 0) -> None:
        """Other values for an array from row `start` on. Raises KeyError, or ValueError for another width."""
        place = self.arrays[name][start : start + len(rows)]
        if place.shape != rows.shape:
            raise ValueError(f"{name} has {place.shape} from row {start} on, and {rows.shape} are to go there")
        place[...] = rows

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.arrays = {}
        del self._file
        self._path.unlink(missing_ok=True)
