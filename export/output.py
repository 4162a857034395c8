"""The directory under construction: files are written front to back and hashed on the way, so none is read again.

Only what an earlier run left is read, once, to see that it is what its journal says.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from phisight.export.journal import Journal, Mark
from phisight.manifest import FileEntry, hash_file

__all__ = ["OutputDirectory", "OutputFile"]

T = TypeVar("T")
READ_AT_ONCE = 4 << 20


class OutputFile:
    """One file, written in order and never mapped, so that a full disk is an ordinary error.

    `units` of it, tensors as a rule, are complete from an earlier run.
    """

    def __init__(self, file: BinaryIO, record: Callable[[Mark], None] = lambda mark: None) -> None:
        self._file = file
        self._record = record
        self._hash = hashlib.sha256()
        self.position = 0
        self.units = 0

    def go_on(self, marks: Sequence[Mark]) -> None:
        """Take over what an earlier run wrote, as far as the checksums confirm it, and cut off the rest."""
        digest = self._hash.copy()
        reached = 0
        for mark in marks:
            while reached < mark.bytes and (piece := self._file.read(min(READ_AT_ONCE, mark.bytes - reached))):
                digest.update(piece)
                reached += len(piece)
            if reached != mark.bytes or digest.hexdigest() != mark.sha256:
                break
            self._hash, self.position, self.units = digest.copy(), mark.bytes, mark.units
        self._file.seek(self.position)
        self._file.truncate()

    def unwritten(self, units: Sequence[T]) -> Iterator[T]:
        """The units that are still to be written, in order. Each is recorded when the next is asked for."""
        for unit in units[self.units :]:
            yield unit
            self._file.flush()
            self.units += 1
            self._record(Mark(self.units, self.position, self._hash.hexdigest()))

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.position += len(data)

    def write_array(self, array: NDArray[Any]) -> None:
        """The array's bytes in C order, without a copy if they lie so."""
        self.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def pad_to(self, position: int) -> None:
        """Zeros up to `position`."""
        self.write(bytes(position - self.position))

    def entry(self) -> FileEntry:
        return FileEntry(self.position, self._hash.hexdigest())


class OutputDirectory:
    """The files of a model directory, and what its manifest says of them.

    With a `journal`, data files go on where an earlier run left them; a file that it does not name is removed.
    """

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self.path = path
        self._journal = journal
        self._entries: dict[str, FileEntry] = {}
        if journal is not None:
            for file in path.iterdir():
                if file.name not in journal.marks:
                    file.unlink()

    @property
    def entries(self) -> dict[str, FileEntry]:
        """Size and hash of every file so far, by name, in order of the names."""
        return dict(sorted(self._entries.items()))

    @contextmanager
    def open(self, name: str) -> Iterator[OutputFile]:
        """A new file, or one of an earlier run, at the end of its last complete unit."""
        path, journal = self.path / name, self._journal
        marks = [] if journal is None or not path.is_file() else journal.marks.get(name, [])
        with path.open("r+b" if marks else "wb") as file:
            output = OutputFile(file) if journal is None else OutputFile(file, lambda mark: journal.add(name, mark))
            output.go_on(marks)
            yield output
        self._entries[name] = output.entry()

    def copy(self, source: Path) -> None:
        """A file taken over as it is."""
        shutil.copyfile(source, self.path / source.name)
        self._entries[source.name] = FileEntry(source.stat().st_size, hash_file(source))
