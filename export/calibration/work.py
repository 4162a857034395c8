"""The work directory: activations at one layer boundary, moments of finished layers, and a journal of how far it got.

    journal.json      {"schema": 1, "identity": hex, "boundary": k}: the inputs of stage k are complete
    boundary-k.f32    (positions, hidden) float32, what goes into stage k
    moments-k.npz     second moments and weights of stage k's linear layers, by tensor
    weights.f32       the weights of the stage at work, mapped by the engine

A file is written under its name first and then named by the journal, which is replaced in one step: after a kill the
journal's boundary is whole, and what lies beyond it is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phisight.errors import InputError, PhisightError
from phisight.quant.methods.base import InputStatistics

__all__ = ["Boundary", "WorkDirectory"]

JOURNAL, PART = "journal.json", "journal.part"
SCHEMA = 1


class Boundary:
    """A file of activations, read and written sequence by sequence: (positions, width) float32."""

    def __init__(self, path: Path, width: int, *, new: bool = False) -> None:
        self._width = width
        self._file = path.open("w+b" if new else "r+b", buffering=0)

    def read(self, start: int, count: int) -> NDArray[np.float32]:
        """Positions [start, start + count). Raises PhisightError for a file that is too short."""
        rows = np.empty((count, self._width), np.float32)
        self._file.seek(start * self._width * 4)
        view = rows.data.cast("B")
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                raise PhisightError(f"{self._file.name} ends early: remove the work directory and calibrate again")
            done += got
        return rows

    def write(self, start: int, rows: NDArray[np.float32]) -> None:
        """Positions from `start` on."""
        self._file.seek(start * self._width * 4)
        view = np.ascontiguousarray(rows, np.float32).data.cast("B")
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """To the disk, so that the journal may name it."""
        os.fsync(self._file.fileno())
        self._file.close()


class WorkDirectory:
    """The files of one calibration. `boundary` is the stage whose inputs are there, None before the first."""

    def __init__(self, path: Path, identity: str, width: int) -> None:
        """Take up an earlier run of the same `identity` (see `Calibration`), or begin.

        Raises InputError for a directory that holds something else.
        """
        self.path = path
        self._identity = identity
        self._width = width
        try:
            path.mkdir(exist_ok=True)
            self.boundary = self._read_journal()
        except OSError as error:
            raise InputError(
                f"the work directory {path} cannot be used: {error.strerror or error}: choose another"
            ) from None

    def _read_journal(self) -> int | None:
        journal = self.path / JOURNAL
        if not journal.is_file():
            if any(path.name != PART for path in self.path.iterdir()):  # a kill may have come before the journal
                raise InputError(f"the work directory {self.path} is neither empty nor a calibration: choose another")
            self._write_journal(None)
            return None
        try:
            found = json.loads(journal.read_text(encoding="utf-8"))
            schema, identity, boundary = found["schema"], found["identity"], found["boundary"]
        except (ValueError, KeyError, TypeError):
            schema = identity = boundary = None
        if schema != SCHEMA or identity != self._identity:
            raise InputError(
                f"the work directory {self.path} belongs to a calibration of another checkpoint, other data or other "
                "options: remove it, or choose another"
            )
        return None if boundary is None else int(boundary)

    def file(self, stage: int) -> Path:
        return self.path / f"boundary-{stage}.f32"

    def open(self, stage: int) -> Boundary:
        """The complete inputs of a stage. Raises PhisightError if the file is gone."""
        try:
            return Boundary(self.file(stage), self._width)
        except OSError as error:
            raise PhisightError(
                f"{self.file(stage)} cannot be read ({error.strerror or error}): remove {self.path} and calibrate again"
            ) from None

    def create(self, stage: int) -> Boundary:
        """A file for the inputs of a stage that is not reached yet."""
        return Boundary(self.file(stage), self._width, new=True)

    def reached(self, stage: int) -> None:
        """The inputs of `stage` are complete: those before it may go."""
        self._write_journal(stage)
        self.boundary = stage
        for earlier in self.path.glob("boundary-*.f32"):
            if earlier != self.file(stage):
                earlier.unlink()

    def save_moments(self, stage: int, statistics: Mapping[str, InputStatistics]) -> None:
        """Keep the second moments and weights of a stage's layers."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, each in statistics.items():
            arrays[name] = each.second_moment
            arrays[f"{name}#"] = np.array(each.count)
        part = self.path / "moments.part"
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        part.replace(self.path / f"moments-{stage}.npz")

    def moments(self, stage: int) -> dict[str, InputStatistics]:
        """What `save_moments` kept, without Hessians. Raises PhisightError."""
        path = self.path / f"moments-{stage}.npz"
        try:
            with np.load(path) as file:
                names = [name for name in file.files if not name.endswith("#")]
                return {name: InputStatistics(file[name], None, float(file[f"{name}#"])) for name in names}
        except (OSError, ValueError, KeyError) as error:
            raise PhisightError(f"{path} cannot be read ({error}): remove {self.path} and calibrate again") from None

    def _write_journal(self, boundary: int | None) -> None:
        part = self.path / PART
        with part.open("w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, "identity": self._identity, "boundary": boundary}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path / JOURNAL)
