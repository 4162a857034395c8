"""What the machine's processors are and which of them this process may use."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

__all__ = ["Processors", "find_processors"]


@dataclass(frozen=True)
class Processors:
    """The processors as far as they matter for a number of threads.

    cores: cores that this process may use and that are worth a thread, at least 1; SMT siblings count once.
    kind: what `cores` counts: "performance" cores, slower ones left out; all "physical" cores; or "logical"
        processors, where the system does not tell what belongs to one core.
    usable, total: logical processors that the process may run on, and that the machine has.
    quota: processors' worth of time that a container grants; None without a limit.
    """

    cores: int
    kind: Literal["performance", "physical", "logical"]
    usable: int
    total: int
    quota: float | None = None


def find_processors() -> Processors:
    """This machine's processors. Where a system does not answer, its logical processors are counted."""
    count = os.cpu_count() or 1
    return _ask_system() or Processors(count, "logical", usable=count, total=count)


def _ask_system() -> Processors | None:
    if sys.platform == "linux":
        from phisight.processors_linux import linux_processors

        return linux_processors(os.sched_getaffinity(0))
    elif sys.platform == "win32":
        from phisight.processors_windows import windows_processors

        return windows_processors()
    elif sys.platform == "darwin":
        from phisight.processors_macos import macos_processors, sysctl

        return macos_processors(sysctl)
    else:
        return None
