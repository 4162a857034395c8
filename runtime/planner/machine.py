"""What the machine has: memory, and how fast it reads and multiplies."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from phisight.bench.bounds import Bounds
from phisight.errors import InputError

__all__ = ["Machine", "memory_bytes", "read_bytes"]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Machine:
    """`memory` in bytes, and where that is known from; `bounds` None where nothing was measured."""

    memory: int
    memory_source: str
    bounds: Bounds | None


def read_bytes(option: str, text: str) -> int:
    """ "16GB" or "15.5GiB" in bytes. Raises InputError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = 0 if match is None or match[2] not in UNITS else int(float(match[1]) * UNITS[match[2]])
    if size <= 0:
        raise InputError(f"{option} is {text!r}, wanted a size such as 16GB or 15.5GiB")
    return size


def memory_bytes() -> int:
    """Of this machine, or of its container where that may use less. Raises InputError if the system does not tell."""
    if sys.platform == "win32":
        return _windows()
    total = 0
    with suppress(ValueError, OSError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(ValueError, OSError):  # "max" is no number: then there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        total = min(total, limit) if total else limit
    if total <= 0:
        raise InputError("this system does not tell how much memory it has: say it with --memory 16GB")
    return total


def _windows() -> int:
    """MEMORYSTATUSEX (sysinfoapi.h): length, load, then seven sizes, the first of which is the physical memory."""

    class Status(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("sizes", ctypes.c_uint64 * 7))

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.CDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status)):
        raise InputError("this system does not tell how much memory it has: say it with --memory 16GB")
    return int(status.sizes[0])
