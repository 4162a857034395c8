"""Windows: processors from GetLogicalProcessorInformationEx.

Layout of SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX, PROCESSOR_RELATIONSHIP and GROUP_AFFINITY: Microsoft's
winnt.h reference, for 64-bit processes, the only ones that engines exist for. CPU rate limits of job objects
are not read.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phisight.processors import Processors

__all__ = ["WindowsCore", "count_cores", "parse_cores", "windows_processors"]

_RELATION_PROCESSOR_CORE = 0
_HEADER = struct.Struct("<II")  # relationship, size of the record
_CORE = struct.Struct("<BB20xH")  # flags, efficiency class, reserved, group count
_GROUP_AFFINITY = struct.Struct("<QH6x")  # mask, group, reserved


@dataclass(frozen=True)
class WindowsCore:
    """A core: its efficiency class (higher is faster) and the masks of its logical processors by group."""

    efficiency_class: int
    masks: Mapping[int, int]


def parse_cores(records: bytes) -> list[WindowsCore]:
    """The cores in a buffer that GetLogicalProcessorInformationEx filled; records of other kinds are skipped.

    Raises ValueError when the records do not fit the buffer.
    """
    cores: list[WindowsCore] = []
    start = 0
    while start < len(records):
        if start + _HEADER.size > len(records):
            raise ValueError(f"a record's header at byte {start} is cut off at {len(records)}")
        relationship, size = _HEADER.unpack_from(records, start)
        if size < _HEADER.size or start + size > len(records):
            raise ValueError(f"a record of {size} bytes at byte {start} does not fit {len(records)}")
        if relationship == _RELATION_PROCESSOR_CORE:
            body = records[start + _HEADER.size : start + size]
            _, efficiency_class, groups = _CORE.unpack_from(body)
            affinities = (
                _GROUP_AFFINITY.unpack_from(body, _CORE.size + index * _GROUP_AFFINITY.size) for index in range(groups)
            )
            cores.append(WindowsCore(efficiency_class, {group: mask for mask, group in affinities}))
        start += size
    return cores


def count_cores(cores: Sequence[WindowsCore], affinity: Mapping[int, int] | None) -> Processors | None:
    """Processors within the affinity masks by group (None: all); None if no core is left."""

    def usable_cpus(core: WindowsCore) -> int:
        masks = core.masks.items()
        allowed = (mask if affinity is None else mask & affinity.get(group, 0) for group, mask in masks)
        return sum(mask.bit_count() for mask in allowed)

    usable = [core for core in cores if usable_cpus(core)]
    if not usable:
        return None
    fastest = max(core.efficiency_class for core in usable)
    fast = [core for core in usable if core.efficiency_class == fastest]
    return Processors(
        cores=len(fast),
        kind="performance" if len(fast) < len(usable) else "physical",
        usable=sum(map(usable_cpus, usable)),
        total=sum(mask.bit_count() for core in cores for mask in core.masks.values()),
    )


def windows_processors() -> Processors | None:
    """This machine's processors; None if the system does not tell."""
    if sys.platform == "win32":
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        size = ctypes.c_uint32(0)
        # The first call fails on purpose: it tells the size.
        kernel.GetLogicalProcessorInformationEx(_RELATION_PROCESSOR_CORE, None, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        if kernel.GetLogicalProcessorInformationEx(_RELATION_PROCESSOR_CORE, buffer, ctypes.byref(size)):
            return count_cores(parse_cores(buffer.raw[: size.value]), _affinity(kernel))
    return None


def _affinity(kernel: ctypes.CDLL) -> dict[int, int] | None:
    """The process's affinity mask by group; None when it is not restricted or spans several groups."""
    process, system = ctypes.c_size_t(0), ctypes.c_size_t(0)
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel.GetCurrentProcess())
    if not kernel.GetProcessAffinityMask(handle, ctypes.byref(process), ctypes.byref(system)):
        return None
    if process.value in (0, system.value):  # 0: threads in several groups
        return None
    groups, count = (ctypes.c_uint16 * 1)(), ctypes.c_uint16(1)
    if not kernel.GetProcessGroupAffinity(handle, ctypes.byref(count), groups):
        return None
    return {groups[0]: process.value}
