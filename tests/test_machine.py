"""What the machine lets us use, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from localllm.machine import Cores, _memory_macos, allocating_at_most, cores, cpu_model, memory

GIB = 1 << 30


MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 16 GiB, 12 of them available, and no control groups."""
    write(
        tmp_path,
        "proc/meminfo",
        f"MemTotal: {16 * GIB // 1024} kB\nMemFree: {2 * GIB // 1024} kB\n"
        f"MemAvailable: {12 * GIB // 1024} kB\n",
    )
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_without_limits_is_what_the_kernel_says(root: Path) -> None:
    found = memory(root)
    assert (found.total, found.available, found.limit) == (16 * GIB, 12 * GIB, None)


def test_old_kernels_without_memavailable_fall_back_to_free_memory(root: Path) -> None:
    write(root, "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1024 kB\n")
    assert memory(root).available == 1024 * 1024


def test_a_v2_limit_replaces_the_total_and_counts_what_is_used(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/app\n")
    write(root, "sys/fs/cgroup/app/memory.max", f"{4 * GIB}\n")
    write(root, "sys/fs/cgroup/app/memory.current", f"{3 * GIB}\n")
    found = memory(root)
    assert (found.total, found.available, found.limit) == (4 * GIB, 1 * GIB, 4 * GIB)


def test_file_pages_the_kernel_gives_back_do_not_count_as_used(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", f"{4 * GIB}")
    write(root, "sys/fs/cgroup/memory.current", f"{3 * GIB}")
    write(root, "sys/fs/cgroup/memory.stat", f"anon {GIB}\ninactive_file {2 * GIB}\n")
    assert memory(root).available == 3 * GIB


def test_the_tightest_group_among_the_parents_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/outer/inner\n")
    write(root, "sys/fs/cgroup/outer/memory.max", f"{2 * GIB}")
    write(root, "sys/fs/cgroup/outer/inner/memory.max", f"{8 * GIB}")
    assert memory(root).limit == 2 * GIB


def test_an_unlimited_v2_group_changes_nothing(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/app\n")
    write(root, "sys/fs/cgroup/app/memory.max", "max\n")
    assert memory(root).limit is None


def test_a_v1_limit_is_found_where_a_container_sees_only_its_own_tree(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/docker/0123\n1:cpu,cpuacct:/docker/0123\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GIB}\n")
    write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB // 2}\n")
    write(root, "sys/fs/cgroup/memory/memory.stat", f"total_inactive_file {GIB // 4}\n")
    found = memory(root)
    assert (found.limit, found.available) == (GIB, 3 * GIB // 4)


def test_the_v1_number_for_unlimited_is_no_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory(root).limit is None


def test_a_limit_above_the_machine_is_no_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", f"{64 * GIB}")
    found = memory(root)
    assert (found.total, found.limit) == (16 * GIB, None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what is allocated")
def test_allocations_beyond_what_is_allowed_fail_and_later_ones_do_not() -> None:
    with allocating_at_most(64 * MIB):
        bytearray(32 * MIB)
        with pytest.raises(MemoryError):
            bytearray(128 * MIB)
    bytearray(128 * MIB)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {"sys/fs/cgroup/cpu.max": "300000 100000", "sys/fs/cgroup/a/cpu.max": "50000 100000"},
            0.5,
        ),
    ],
)
def test_a_v2_processor_quota_is_read(root: Path, files: dict[str, str], quota: float) -> None:
    write(root, "proc/self/cgroup", "0::/a\n")
    for name, text in files.items():
        write(root, name, text)
    assert cores(root).quota == quota


@pytest.mark.parametrize(("microseconds", "quota"), [("-1", None), ("250000", 2.5)])
def test_a_v1_processor_quota_is_read(root: Path, microseconds: str, quota: float) -> None:
    write(root, "proc/self/cgroup", "1:cpu,cpuacct:/\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", microseconds)
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert cores(root).quota == quota


@pytest.mark.parametrize(
    ("found", "usable"),
    [
        (Cores(installed=8, allowed=8), 8),
        (Cores(installed=8, allowed=2), 2),
        (Cores(installed=8, allowed=8, quota=2.5), 2),
        (Cores(installed=8, allowed=8, quota=0.5), 1),
        (Cores(installed=8, allowed=4, quota=16.0), 4),
    ],
)
def test_usable_cores_respect_affinity_and_quota(found: Cores, usable: int) -> None:
    assert found.usable == usable


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has an affinity mask")
def test_cores_outside_the_affinity_mask_are_not_counted(root: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores(root).allowed == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_processor_names_itself(root: Path) -> None:
    write(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Example 9000 X\n")
    assert cpu_model(root) == "Example 9000 X"


def test_a_processor_without_a_name_is_called_by_its_architecture(root: Path) -> None:
    write(root, "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 48.00\n")
    assert cpu_model(root) == os.uname().machine


def test_macos_counts_pages_it_can_hand_out_at_once_as_available() -> None:
    vm_stat = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               1000.\n"
        "Pages active:                             9000.\n"
        "Pages inactive:                            500.\n"
        "Pages speculative:                          20.\n"
        "Pages wired down:                         3000.\n"
        "Pages purgeable:                             3.\n"
        "Pages stored in compressor:                  7.\n"
    )
    found = _memory_macos(f"{16 * GIB}\n", vm_stat)
    assert (found.total, found.available) == (16 * GIB, 1523 * 16384)


def test_this_machine_has_memory_and_cores() -> None:
    here, processors = memory(), cores()
    assert 0 < here.available <= here.total
    assert 1 <= processors.usable <= processors.allowed <= processors.installed


def test_freed_memory_goes_back_to_the_system() -> None:
    code = (
        "from localllm.machine import resident_memory, return_freed_memory\n"
        "pieces = [bytearray(50_000) for _ in range(2000)]\n"
        "last = pieces[-1]; del pieces  # the last one keeps the rest from going by itself\n"
        "before = resident_memory()[0]; return_freed_memory()\n"
        "print(before - resident_memory()[0])"
    )
    freed = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert freed > 50_000_000
