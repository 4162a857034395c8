"""The most memory that this process has had in use at once, as the system counts it.

Files that are mapped count as far as they have been read: llama.cpp's weights are, ONNX Runtime's are for a while.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from pathlib import Path

__all__ = ["peak_memory"]

KIB = 1024
RUSAGE_SELF = 0


def peak_memory() -> int | None:
    """Peak resident set in bytes; None where the system does not tell.

    On Linux not getrusage, which goes on counting what the parent process had.
    """
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin":
        return _macos()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else int(found) * KIB


def _macos() -> int | None:
    """struct rusage (getrusage(2)): two times of 16 bytes, then ru_maxrss, in bytes on macOS."""
    usage = (ctypes.c_long * 18)()
    failed = ctypes.CDLL(ctypes.util.find_library("c")).getrusage(RUSAGE_SELF, ctypes.byref(usage))
    return None if failed else int(usage[4])


def _windows() -> int | None:
    """PROCESS_MEMORY_COUNTERS (psapi.h): size, page faults, then PeakWorkingSetSize as the first of eight sizes."""

    class Counters(ctypes.Structure):
        _fields_ = (
            ("size", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            ("sizes", ctypes.c_size_t * 8),
        )

    kernel = ctypes.CDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    counters = Counters(size=ctypes.sizeof(Counters))
    done = kernel.K32GetProcessMemoryInfo(
        ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(counters), ctypes.c_uint32(counters.size)
    )
    return int(counters.sizes[0]) if done else None
