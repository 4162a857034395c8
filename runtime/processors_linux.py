"""Linux: processors from /sys, the process's CPU quota from its control groups.

Sources: the kernel's documentation, admin-guide/cputopology.rst, admin-guide/cgroup-v2.rst ("cpu.max"),
scheduler/sched-bwc.rst (cfs quota), ABI/testing/sysfs-devices-system-cpu (cpu_capacity), and
/sys/devices/cpu_core, which the perf driver of hybrid Intel processors makes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from phisight.processors import Processors

__all__ = ["cpu_quota", "linux_processors", "parse_cpu_list"]

# A core slower than this share of the fastest is left out. It parts ARM's little cores (0.2 to 0.5) from big
# ones beside a prime core (0.7 and more), and ignores the few percent between cores with and without turbo.
_FAST_SHARE = 0.6


def linux_processors(affinity: Collection[int], *, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Processors:
    """The processors within `affinity`, the logical processors that the process may run on."""
    cpus = sys / "devices/system/cpu"
    fast = _fast_cpus(affinity, sys)
    cores = {_siblings(cpus, cpu) for cpu in fast}
    known = any(cores)
    total = len(parse_cpu_list(_read(cpus / "online") or ""))
    return Processors(
        cores=len(cores) if known else len(fast),
        kind="performance" if len(fast) < len(affinity) else "physical" if known else "logical",
        usable=len(affinity),
        total=max(total, len(affinity)),
        quota=cpu_quota(sys / "fs/cgroup", proc),
    )


def cpu_quota(cgroups: Path, proc: Path) -> float | None:
    """The smallest CPU quota of the process's control groups and all above them; None without one.

    `cgroups` is where they are mounted, /sys/fs/cgroup. In a container the path in /proc/self/cgroup may be
    the host's, which is not mounted there; its own limit then stands at the root.
    """
    quotas: list[float] = []
    for line in (_read(proc / "self/cgroup") or "").splitlines():
        _, _, group = line.partition(":")
        controllers, _, path = group.partition(":")
        if controllers == "":  # version 2
            roots = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [cgroups / controllers, cgroups / "cpu"]
        else:
            continue
        for root in roots:
            quotas += filter(None, map(_group_quota, _upwards(root, path)))
    return min(quotas, default=None)


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's form of a set of processors, such as "0-3,8" -> {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _fast_cpus(affinity: Collection[int], sys: Path) -> set[int]:
    """Those that are worth a thread: Intel's performance cores, else those near the fastest's speed."""
    usable = set(affinity)
    performance = usable & parse_cpu_list(_read(sys / "devices/cpu_core/cpus") or "")
    if performance:
        return performance
    for measure in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        texts = {cpu: _read(sys / f"devices/system/cpu/cpu{cpu}" / measure) for cpu in usable}
        speeds = {cpu: int(text) for cpu, text in texts.items() if text and text.isdecimal()}
        if len(speeds) == len(usable):
            fastest = max(speeds.values())
            return {cpu for cpu, speed in speeds.items() if speed >= _FAST_SHARE * fastest}
    return usable


def _siblings(cpus: Path, cpu: int) -> frozenset[int]:
    """The logical processors of this one's core; none if not told."""
    topology = cpus / f"cpu{cpu}/topology"
    text = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
    return frozenset(parse_cpu_list(text or ""))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and all above it up to the root."""
    group = root.joinpath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
    yield group
    while group != root:
        group = group.parent
        yield group


def _group_quota(group: Path) -> float | None:
    limit = _read(group / "cpu.max")  # version 2: "200000 100000" or "max 100000"
    if limit is None:
        limit = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    quota, _, period = limit.partition(" ")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None  # "max", -1 or no such file: no limit
    return int(quota) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
