"""The directory under construction: files are written front to back and hashed on the way, so none is read again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from phisight.manifest import FileEntry, hash_file

__all__ = ["OutputDirectory", "OutputFile"]


class OutputFile:
    """One file, written in order and never mapped, so that a full disk is an ordinary error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.position = 0

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
    """The files of a model directory, and what its manifest says of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, FileEntry] = {}

    @property
    def entries(self) -> dict[str, FileEntry]:
        """Size and hash of every file so far, by name, in order of the names."""
        return dict(sorted(self._entries.items()))

    @contextmanager
    def open(self, name: str) -> Iterator[OutputFile]:
        """A new file."""
        with (self.path / name).open("wb") as file:
            output = OutputFile(file)
            yield output
        self._entries[name] = output.entry()

    def copy(self, source: Path) -> None:
        """A file taken over as it is."""
        shutil.copyfile(source, self.path / source.name)
        self._entries[source.name] = FileEntry(source.stat().st_size, hash_file(source))
