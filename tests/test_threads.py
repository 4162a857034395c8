"""The number of threads: made-up machines on each system, and the choice with its reason."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from phisight.errors import InputError
from phisight.processors import Processors, find_processors
from phisight.processors_linux import cpu_quota, linux_processors, parse_cpu_list
from phisight.processors_macos import macos_processors
from phisight.processors_windows import WindowsCore, count_cores, parse_cores
from phisight.threads import ThreadChoice, choose_threads


class Machine:
    """A made-up /sys and /proc. A file is written at its first mention."""

    def __init__(self, root: Path) -> None:
        self.sys, self.proc = root / "sys", root / "proc"

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")

    def cpu(self, number: int, siblings: str, **facts: int) -> None:
        folder = self.sys / f"devices/system/cpu/cpu{number}"
        self.write(folder / "topology/thread_siblings_list", siblings)
        for name, value in facts.items():
            self.write(folder / name.replace("__", "/"), str(value))

    def online(self, cpus: str) -> None:
        self.write(self.sys / "devices/system/cpu/online", cpus)

    def cgroup(self, lines: str, **quotas: str) -> None:
        self.write(self.proc / "self/cgroup", lines)
        for path, text in quotas.items():
            self.write(self.sys / "fs/cgroup" / path, text)

    def processors(self, affinity: set[int]) -> Processors:
        return linux_processors(affinity, sys=self.sys, proc=self.proc)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_laptop_with_performance_and_efficiency_cores(machine: Machine) -> None:
    """4 performance cores of two threads each (CPUs 0-7), 8 efficiency cores of one (CPUs 8-15)."""
    for number in range(8):
        first = number // 2 * 2
        machine.cpu(number, f"{first}-{first + 1}")
    for number in range(8, 16):
        machine.cpu(number, str(number))
    machine.online("0-15")
    machine.write(machine.sys / "devices/cpu_core/cpus", "0-7")
    machine.write(machine.sys / "devices/cpu_atom/cpus", "8-15")

    found = machine.processors(set(range(16)))
    assert found == Processors(4, "performance", usable=16, total=16)
    assert choose_threads("auto", found) == ThreadChoice(4, "4 performance cores in 16 CPUs")
    # Bound to efficiency cores alone, there is nothing faster to wait for.
    assert machine.processors({8, 9, 10}) == Processors(3, "physical", usable=3, total=16)


def test_arm_big_little(machine: Machine) -> None:
    """One prime core, three big ones at 80 %, four little ones at 35 % of it."""
    for number, capacity in enumerate([358] * 4 + [819] * 3 + [1024]):
        machine.cpu(number, str(number), cpu_capacity=capacity)
    machine.online("0-7")
    found = machine.processors(set(range(8)))
    assert found == Processors(4, "performance", usable=8, total=8)


def test_clock_rates_tell_slow_cores_where_capacities_do_not(machine: Machine) -> None:
    for number, kilohertz in enumerate([5_100_000, 4_900_000, 2_000_000, 2_000_000]):
        machine.cpu(number, str(number), cpufreq__cpuinfo_max_freq=kilohertz)
    assert machine.processors({0, 1, 2, 3}).cores == 2


def test_a_few_percent_between_clock_rates_are_no_difference(machine: Machine) -> None:
    for number, kilohertz in enumerate([5_100_000, 5_100_000, 4_700_000, 4_700_000]):
        machine.cpu(number, str(number), cpufreq__cpuinfo_max_freq=kilohertz)
    assert machine.processors({0, 1, 2, 3}) == Processors(4, "physical", usable=4, total=4)


def test_threads_of_one_core_count_once(machine: Machine) -> None:
    """8 cores; the second threads are numbered 8-15, as most x86 systems do."""
    for number in range(16):
        machine.cpu(number, f"{number % 8},{number % 8 + 8}")
    machine.online("0-15")
    found = machine.processors(set(range(16)))
    assert choose_threads("auto", found) == ThreadChoice(8, "8 cores in 16 CPUs")


def test_affinity_to_three_cpus(machine: Machine) -> None:
    """CPUs 0 and 8 are one core, so three CPUs are two cores."""
    for number in range(16):
        machine.cpu(number, f"{number % 8},{number % 8 + 8}")
    machine.online("0-15")
    choice = choose_threads("auto", machine.processors({0, 8, 3}))
    assert choice == ThreadChoice(2, "2 cores in 3 CPUs, the process being limited to 3 of 16")


def test_container_with_a_quota_of_two_of_64_cpus(machine: Machine) -> None:
    for number in range(64):
        machine.cpu(number, str(number))
    machine.online("0-63")
    machine.cgroup("0::/", **{"cpu.max": "200000 100000"})
    found = machine.processors(set(range(64)))
    assert found == Processors(64, "physical", usable=64, total=64, quota=2.0)
    assert choose_threads("auto", found) == ThreadChoice(2, "a quota of 2 CPUs, less than 64 cores in 64 CPUs")


@pytest.mark.parametrize(
    ("lines", "quotas", "wanted"),
    [
        pytest.param("0::/", {"cpu.max": "max 100000"}, None, id="no limit"),
        pytest.param("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5, id="above"),
        pytest.param("0::/a", {"a/cpu.max": "400000 100000", "cpu.max": "50000 100000"}, 0.5, id="smallest"),
        pytest.param("0::/not/mounted", {"cpu.max": "300000 100000"}, 3.0, id="path of the host"),
        pytest.param("0::/../../other", {"cpu.max": "300000 100000"}, 3.0, id="outside of the namespace"),
        pytest.param("0::/", {"unified/cpu.max": "100000 50000"}, 2.0, id="both versions mounted"),
        pytest.param(
            "4:memory:/x\n3:cpu,cpuacct:/job",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "250000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            2.5,
            id="version 1",
        ),
        pytest.param(
            "1:cpu:/docker/abc",
            {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
            1.0,
            id="version 1, path of the host",
        ),
        pytest.param(
            "1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, id="no limit, v1"
        ),
        pytest.param("2:cpuset:/job", {"cpuset/job/cpu.max": "100000 100000"}, None, id="another controller"),
    ],
)
def test_quota(machine: Machine, lines: str, quotas: dict[str, str], wanted: float | None) -> None:
    machine.cgroup(lines, **quotas)
    assert cpu_quota(machine.sys / "fs/cgroup", machine.proc) == wanted


def test_neither_proc_nor_sys(machine: Machine) -> None:
    found = machine.processors({0, 1, 2})
    assert found == Processors(3, "logical", usable=3, total=3, quota=None)
    assert choose_threads("auto", found) == ThreadChoice(3, "3 CPUs")


def test_kernel_lists_of_cpus() -> None:
    assert parse_cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpu_list("\n") == set()


@pytest.mark.parametrize(("quota", "count"), [(0.5, 1), (1.0, 1), (1.5, 1), (2.9, 2), (8.0, 8), (9.5, 8)])
def test_quota_is_rounded_down_to_at_least_one(quota: float, count: int) -> None:
    assert choose_threads("auto", Processors(8, "physical", usable=8, total=8, quota=quota)).count == count


def test_a_requested_number_is_taken() -> None:
    processors = Processors(4, "physical", usable=8, total=8, quota=2.5)
    assert choose_threads(2, processors) == ThreadChoice(2, "as asked for")
    assert choose_threads(3, processors) == ThreadChoice(3, "as asked for, more than the quota of 2.5 CPUs")
    above = choose_threads(9, processors)
    assert above == ThreadChoice(9, "as asked for, more than the 8 CPUs that the process may use")


@pytest.mark.parametrize("requested", [0, -1, True, 1.5, "4", "all", None])
def test_another_request_is_refused(requested: Any) -> None:
    with pytest.raises(InputError, match=r"threads is .*1 or more"):
        choose_threads(requested, Processors(4, "physical", usable=4, total=4))


def test_this_machine() -> None:
    choice = choose_threads("auto")
    assert 1 <= choice.count <= (os.cpu_count() or 1)
    assert choice.reason


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is set as Linux does")
def test_affinity_of_this_process() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        found = find_processors()
    finally:
        os.sched_setaffinity(0, before)
    assert (found.cores, found.usable) == (1, 1)


def test_mac_with_two_kinds_of_cores() -> None:
    numbers = {"hw.logicalcpu": 8, "hw.physicalcpu": 8, "hw.perflevel0.physicalcpu": 4}
    assert macos_processors(numbers.get) == Processors(4, "performance", usable=8, total=8)


def test_mac_with_an_intel_processor() -> None:
    numbers = {"hw.logicalcpu": 12, "hw.physicalcpu": 6}
    assert macos_processors(numbers.get) == Processors(6, "physical", usable=12, total=12)


def test_mac_that_does_not_answer() -> None:
    assert macos_processors(lambda name: None) is None


def windows_record(efficiency_class: int, masks: Mapping[int, int]) -> bytes:
    """A processor core's record, field by field as winnt.h declares it."""
    body = bytes([0, efficiency_class]) + bytes(20) + struct.pack("<H", len(masks))
    for group, mask in masks.items():
        body += struct.pack("<Q", mask) + struct.pack("<H", group) + bytes(6)
    return struct.pack("<II", 0, 8 + len(body)) + body


def test_windows_records() -> None:
    core_of_another_kind = struct.pack("<II", 3, 16) + bytes(8)
    records = windows_record(1, {0: 0b11}) + core_of_another_kind + windows_record(0, {1: 0b100})
    assert len(windows_record(1, {0: 0b11})) == 48  # the size that Windows reports for one group
    assert parse_cores(records) == [WindowsCore(1, {0: 0b11}), WindowsCore(0, {1: 0b100})]


@pytest.mark.parametrize("records", [bytes(3), struct.pack("<II", 0, 48), struct.pack("<II", 0, 0)])
def test_damaged_windows_records_are_refused(records: bytes) -> None:
    with pytest.raises(ValueError, match="byte 0"):
        parse_cores(records)


def test_windows_cores() -> None:
    """Two performance cores of two threads, three efficiency cores of one."""
    fast = [WindowsCore(1, {0: 0b11}), WindowsCore(1, {0: 0b1100})]
    slow = [WindowsCore(0, {0: 1 << bit}) for bit in (4, 5, 6)]
    assert count_cores(fast + slow, None) == Processors(2, "performance", usable=7, total=7)
    assert count_cores(fast + slow, {0: 0b0110001}) == Processors(1, "performance", usable=3, total=7)
    assert count_cores(fast + slow, {0: 0b1110000}) == Processors(3, "physical", usable=3, total=7)
    assert count_cores(fast + slow, {1: 0b1}) is None


def test_windows_groups_are_told_apart() -> None:
    cores = [WindowsCore(0, {group: 0b11 << (2 * index)}) for group in (0, 1) for index in range(32)]
    assert count_cores(cores, None) == Processors(64, "physical", usable=128, total=128)
    assert count_cores(cores, {1: 0b1111}) == Processors(2, "physical", usable=4, total=128)
