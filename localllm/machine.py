"""What this machine lets a process use: memory and cores, containers and affinity included.

A container's limits are not in what the kernel says of the whole machine; they are read from the
control groups (v1 and v2) and from each of their parents, and the tightest one counts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_NO_LIMIT = 1 << 60  # cgroup v1 says "unlimited" with a number near 2**63


@dataclass(frozen=True)
class Memory:
    """Bytes. `total` and `available` already respect `limit`, the control group's, if any."""

    total: int
    available: int
    limit: int | None = None


@dataclass(frozen=True)
class Cores:
    """`usable`: threads that can run at once. It respects `allowed` and `quota`.

    installed: logical processors of the machine; allowed: those in the affinity mask;
    quota: processor time per time that the control group grants, None when unlimited.
    """

    installed: int
    allowed: int
    quota: float | None = None

    @property
    def usable(self) -> int:
        # Rounded down: a thread more than the quota pays for stalls all others when it is spent.
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


def memory(root: Path = _ROOT) -> Memory:
    """The memory this process may use. `root` is the file system to read (for tests)."""
    if sys.platform == "darwin" and root == _ROOT:
        return _memory_macos(_run("sysctl", "-n", "hw.memsize"), _run("vm_stat"))
    fields = _meminfo(root)
    total = fields["MemTotal"]
    available = fields.get("MemAvailable", fields.get("MemFree", 0))
    limit: int | None = None
    for group in _memory_groups(root):
        if group.limit < total:
            limit = group.limit if limit is None else min(limit, group.limit)
            available = min(available, max(0, group.limit - group.used))
    return Memory(total if limit is None else limit, available, limit)


def cores(root: Path = _ROOT) -> Cores:
    """The processors this process may use. `root` is the file system to read (for tests)."""
    installed = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else installed
    return Cores(installed, allowed, min(_cpu_quotas(root), default=None))


def resident_memory(root: Path = _ROOT) -> tuple[int | None, int | None]:
    """Bytes of this process in memory now, and at its highest; None where the system is silent."""
    if sys.platform == "linux":
        fields = re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", _read(root / "proc/self/status"), re.M)
        found = {name: int(value) * 1024 for name, value in fields}
        return found.get("VmRSS"), found.get("VmHWM")
    now = _run("ps", "-o", "rss=", "-p", str(os.getpid())).strip()
    return (int(now) * 1024 if now.isdigit() else None), None


def forget_peak_memory() -> bool:
    """Makes the highest memory so far the present one; False where the system cannot (not Linux)"""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def return_freed_memory() -> None:
    """Gives what was freed back to the system; glibc would keep it for allocations to come."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # other C libraries have none
            trim(0)


def give_large_blocks_back() -> None:
    """From now on blocks of a megabyte or more go back to the system as soon as they are freed.

    glibc would keep those of up to 32 MB once it has seen one, and where sizes differ from step to
    step its heap grows with the holes between them.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # other C libraries have none
            mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


@contextmanager
def allocating_at_most(nbytes: int) -> Iterator[None]:
    """Allocations fail once they come to so many bytes more than now (Linux; else nothing happens).

    Without this a process that meets its control group's limit is killed, with no word to anyone.
    """
    if sys.platform != "linux":
        yield
        return
    found = re.search(r"^VmData:\s+(\d+) kB", _read(_ROOT / "proc/self/status"), re.M)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if found is None:
        yield
        return
    limits = [int(found[1]) * 1024 + max(0, nbytes)]
    limits += [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def cpu_model(root: Path = _ROOT) -> str:
    """The processor's name as its maker gives it, or the architecture where it gives none."""
    if sys.platform == "darwin" and root == _ROOT:
        return _run("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.machine()
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return platform.machine()


@dataclass(frozen=True)
class _MemoryGroup:
    limit: int
    used: int  # without file pages that the kernel gives back when asked


def _memory_groups(root: Path) -> Iterator[_MemoryGroup]:
    """The control groups that limit our memory, v2 and v1."""
    for folder in _group_folders(root, controller="memory"):
        for limit_file, used_file, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(_read(folder / limit_file))
            if limit is None or limit >= _NO_LIMIT:
                continue
            used = _number(_read(folder / used_file)) or 0
            stat = _fields(_read(folder / "memory.stat"))
            yield _MemoryGroup(limit, max(0, used - stat.get(reclaimable, 0)))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time granted by each control group that limits it."""
    for folder in _group_folders(root, controller="cpu"):
        # v2: "QUOTA PERIOD", the quota "max" when unlimited; v1: two files, -1 when unlimited.
        pair = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us"),
            _read(folder / "cpu.cfs_period_us"),
        ]
        quota, period = (_number(text) for text in (*pair, "")[:2])
        if quota is not None and quota > 0 and period:
            yield quota / period


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Our control group's folder and its parents', in the v2 tree and in the controller's v1 tree.

    Inside a container the tree may begin at our own group while the path still is the host's;
    folders that are not there are harmless, the root of the tree is always among the parents.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        own = Path(path.strip().lstrip("/"))
        for folder in (own, *own.parents):
            yield top / folder


def _memory_macos(memsize: str, vm_stat: str) -> Memory:
    """From what `sysctl -n hw.memsize` and `vm_stat` print."""
    total = int(memsize)
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = {
        name: int(count) for name, count in re.findall(r"^Pages (.+?):\s+(\d+)\.", vm_stat, re.M)
    }
    free = sum(pages.get(name, 0) for name in ("free", "inactive", "speculative", "purgeable"))
    return Memory(total, min(total, free * int(page[1])) if page else total)


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"), re.M)
    return {name: int(value) * 1024 for name, value in found}


def _fields(text: str) -> dict[str, int]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None  # "max", or the file is not there


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
