"""macOS: processors from sysctl. The system has neither processor affinity nor CPU quotas."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

from phisight.processors import Processors

__all__ = ["macos_processors", "sysctl"]


def macos_processors(query: Callable[[str], int | None]) -> Processors | None:
    """The processors, from the numbers that `query` gives for names of sysctl; None if it knows too little.

    Performance level 0 is the fastest (sysctl(3), "hw.perflevel"); Intel Macs have no levels.
    """
    total = query("hw.logicalcpu")
    physical = query("hw.physicalcpu")
    if not total or not physical:
        return None
    performance = query("hw.perflevel0.physicalcpu") or physical
    return Processors(
        cores=performance,
        kind="performance" if performance < physical else "physical",
        usable=total,
        total=total,
    )


def sysctl(name: str) -> int | None:
    """A whole number that the kernel knows by this name; None if it knows none."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    value = ctypes.c_int64(0)  # little-endian and zero, so that a number of 32 bits may fill its lower half
    size = ctypes.c_size_t(ctypes.sizeof(value))
    nothing_new = None, ctypes.c_size_t(0)
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), *nothing_new)
    return None if failed else value.value
