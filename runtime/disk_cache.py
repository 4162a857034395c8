"""Entries on disk that save work: checked, bounded, safe with several processes, never needed.

An entry is written beside its place and renamed, so that it is whole or not there whatever ends a process; there are no
locks. An entry that is damaged, or stale because what it was made of has changed since, is told of, removed and treated
as absent. Where the sum exceeds the limit, the entries that were not used for longest go.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import uuid
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np

__all__ = ["DiskCache", "DiskCacheNotice"]

HEADER = struct.Struct("<8s32s32sQ")
"""What follows, a digest of what the entry was made of, a checksum of its payload, and the payload's bytes."""
MAGIC = b"phicach2"
SUFFIX = ".entry"
LEFTOVER_SECONDS = 3600
"""After so long a file that was never renamed is taken for one that a process left behind."""


class DiskCacheNotice(UserWarning):
    """An entry could not be used or kept; the work is done as without a cache."""


class DiskCache:
    """A folder of entries, at most `limit` bytes in all. `least_seconds`: what takes less is not worth an entry."""

    def __init__(self, directory: Path, *, limit: int = 8 << 30, least_seconds: float = 0.0) -> None:
        self.directory = directory
        self.limit = limit
        self.least_seconds = least_seconds

    def read(self, key: str, stamp: str = "") -> memoryview | None:
        """The bytes kept under a key, mapped from the file; None if there are none, or if they cannot be used.

        `stamp` says what they must be made of: those of another one are stale.
        """
        path = self._path(key)
        try:
            if path.stat().st_size < HEADER.size:
                self._damaged(path, "it was cut short")
                return None
            file = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._damaged(path, str(error))
            return None
        payload = file.data[HEADER.size :]
        if (fault := _fault(file[: HEADER.size].tobytes(), payload, stamp)) is not None:
            payload.release()
            del file  # what is mapped cannot be removed on Windows
            self._damaged(path, fault)
            return None
        with suppress(OSError):
            os.utime(path)
        return payload

    def write(self, key: str, payload: bytes, seconds: float, stamp: str = "", *, replace: bool = False) -> None:
        """Keep bytes that took so many seconds to make, if that is worth it; `stamp` as for `read`.

        What is there already stays, as made of the same, unless `replace` says that it is to give way.
        """
        if seconds < self.least_seconds or len(payload) + HEADER.size > self.limit:
            return
        if self._path(key).exists() and not replace:
            return
        beside = self.directory / f"{uuid.uuid4().hex}.part"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(HEADER.pack(MAGIC, _digest(stamp.encode()), _digest(payload), len(payload)))
                file.write(payload)
            beside.replace(self._path(key))
        except OSError as error:
            self._notice(f"the cache {self.directory} cannot be written: {error.strerror or error}")
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        self._trim()

    def entries(self) -> list[tuple[Path, os.stat_result]]:
        """Entries with their sizes and times, the one used last at the end."""
        found = []
        for path in self.directory.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process may have removed it
                found.append((path, path.stat()))
        return sorted(found, key=lambda entry: entry[1].st_mtime_ns)

    def _trim(self) -> None:
        for leftover in self.directory.glob("*.part"):
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                    leftover.unlink()
        entries = self.entries()
        excess = sum(stat.st_size for _, stat in entries) - self.limit
        for path, stat in entries:
            if excess <= 0:
                break
            with suppress(OSError):
                path.unlink()
            excess -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.directory / (hashlib.sha256(key.encode()).hexdigest() + SUFFIX)

    def _damaged(self, path: Path, why: str) -> None:
        self._notice(f"the cache's entry {path} is ignored and removed: {why}")
        with suppress(OSError):
            path.unlink()

    def _notice(self, text: str) -> None:
        warnings.warn(text, DiskCacheNotice, stacklevel=3)


def _fault(header: bytes, payload: memoryview, stamp: str) -> str | None:
    """What is wrong with an entry."""
    magic, made_of, checksum, size = HEADER.unpack(header)
    if magic != MAGIC or size != len(payload):
        return "it was cut short or is of another version"
    if _digest(payload) != checksum:
        return "its checksum differs"
    if made_of != _digest(stamp.encode()):
        return "the model's files, or the programs that made it, have changed"
    return None


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
