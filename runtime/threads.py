"""How many threads an engine should use, and why.

"auto" is one thread for each performance core that the process may use: efficiency cores make the fast ones
wait, and a second thread on a core adds nothing to arithmetic that keeps the core's units busy. A container's
CPU quota is rounded down, since threads beyond it use the quota up while they wait for each other, and then
all stand still until the next period. It is never less than one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phisight.errors import InputError
from phisight.processors import Processors, find_processors

__all__ = ["ThreadChoice", "choose_threads", "read_threads"]


@dataclass(frozen=True)
class ThreadChoice:
    """A number of threads, and the reason for it in words for the user."""

    count: int
    reason: str


def choose_threads(requested: int | Literal["auto"], processors: Processors | None = None) -> ThreadChoice:
    """The number of threads; `processors` are this machine's unless given.

    A number is taken as it is, also above what the processors are; the reason then says so.
    Raises InputError for a number below 1 or another word than "auto".
    """
    found = find_processors() if processors is None else processors
    if requested == "auto":
        return _automatic(found)
    if not isinstance(requested, int) or isinstance(requested, bool) or requested < 1:
        raise InputError(f'threads is {requested!r}: give a whole number, 1 or more, or "auto"')
    if requested > found.usable:
        limit = f", more than the {_cpus(found.usable)} that the process may use"
    elif found.quota is not None and requested > found.quota:
        limit = f", more than the quota of {found.quota:g} CPUs"
    else:
        limit = ""
    return ThreadChoice(requested, f"as asked for{limit}")


def read_threads(given: str) -> int | Literal["auto"]:
    """A --threads option, for `choose_threads`. Raises InputError for another word than a number or auto."""
    if given == "auto":
        return "auto"
    try:
        return int(given)
    except ValueError:
        raise InputError(f"--threads is {given!r}, wanted a whole number or auto") from None


def _automatic(found: Processors) -> ThreadChoice:
    if found.kind == "logical":
        reason = _cpus(found.usable)
    else:
        fast = "performance " if found.kind == "performance" else ""
        reason = f"{found.cores} {fast}core{'' if found.cores == 1 else 's'} in {_cpus(found.usable)}"
    if found.total > found.usable:
        reason += f", the process being limited to {found.usable} of {found.total}"
    if found.quota is None or found.quota >= found.cores:
        return ThreadChoice(found.cores, reason)
    count = max(int(found.quota), 1)
    return ThreadChoice(count, f"a quota of {found.quota:g} CPUs, less than {reason}")


def _cpus(count: int) -> str:
    return f"{count} CPU{'' if count == 1 else 's'}"
