"""The journal of an export: what of each data file is written, so that the same command goes on after a kill.

    {"schema": 1, "identity": {"source": hex, "options": hex, "version": text}}
    {"file": "decoder.onnx.data", "units": 3, "bytes": 12345, "sha256": hex}   after every tensor

A line says that the first `bytes` bytes of the file are its first `units` tensors, and what their SHA-256 is. It is
appended after the bytes were handed to the system, and nothing is trusted that the checksum does not confirm: after a
kill the last line holds, after a power failure an earlier one, and a line that was cut off does not count. So no
tensor has to wait for the disk.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from phisight.errors import InputError

__all__ = ["Journal", "Mark"]

SCHEMA = 1


@dataclass(frozen=True)
class Mark:
    """The first `units` tensors of a file are its first `bytes` bytes, which have this SHA-256 (hex)."""

    units: int
    bytes: int
    sha256: str


class Journal:
    """An open journal. `marks` are what it held for each file, in order; `changed` is why it had to begin anew."""

    def __init__(self, file: BinaryIO, identity: Mapping[str, str]) -> None:
        self._file = file
        self.marks: dict[str, list[Mark]] = {}
        self.changed = self._read(dict(identity))

    @classmethod
    @contextmanager
    def open(cls, path: Path, identity: Mapping[str, str]) -> Iterator[Journal]:
        """The journal at `path`, new if there is none or if it is of something else than `identity`.

        The file stays locked meanwhile, also against other programs. Raises InputError if another one has it.
        """
        with path.open("a+b", buffering=0) as file:
            try:
                _lock(file)
            except OSError:
                raise InputError(
                    f"another export to the same place has {path} open: wait for its end, or choose another name"
                ) from None
            yield cls(file, identity)

    def add(self, name: str, mark: Mark) -> None:
        """Append a line. Raises OSError for a disk that is full."""
        self._append({"file": name, **asdict(mark)})

    def _read(self, identity: dict[str, str]) -> tuple[str, ...]:
        """Fill `marks`. Returns the keys of the identity in which an earlier journal differs, which is then emptied."""
        self._file.seek(0)
        head, *lines = self._file.read().split(b"\n")
        changed: tuple[str, ...] = ()
        good = 0
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line that was cut off, or no journal
            begun = json.loads(head)
            if lines and begun["schema"] == SCHEMA:
                changed = tuple(key for key in identity if begun["identity"].get(key) != identity[key])
                good = 0 if changed else len(head) + 1
            for line in lines[:-1] if good else ():
                found = json.loads(line)
                self.marks.setdefault(found.pop("file"), []).append(Mark(**found))
                good += len(line) + 1
        self._file.truncate(good)
        if not good:
            self._append({"schema": SCHEMA, "identity": identity})
        return changed

    def _append(self, document: dict[str, object]) -> None:
        line = json.dumps(document).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(1 << 40)  # what is locked cannot be read on Windows, so it is a byte far behind the end
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:

    def _lock(file: BinaryIO) -> None:
        os.lockf(file.fileno(), os.F_TLOCK, 0)
