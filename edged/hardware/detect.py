"""What this process may use of the machine: cores, their instruction sets and the CPU quota, from sched(7), proc(5)
and the cgroup files."""

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from edged.hardware.cores import SYSFS_CPU, Core, read_cores
from edged.hardware.placement import Machine

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
PROC_MEMINFO = Path("/proc/meminfo")
PROC_CPUINFO = Path("/proc/cpuinfo")


def device_name(configured: str | None) -> str:
    """This device's name in topics, status and profiles: ``probe.device``, else the host's."""
    return configured or socket.gethostname()


def machine(root: Path = CGROUP_ROOT, membership: Path = PROC_CGROUP, sysfs_cpu: Path = SYSFS_CPU) -> Machine:
    """Cores by the affinity mask, quota by the tightest limit from our cgroup up to the root."""
    quotas = [*_v2_quotas(root, membership), *_v1_quotas(root, membership)]
    allowed = os.sched_getaffinity(0)
    known = {core.number: core for core in read_cores(sysfs_cpu)}
    return Machine(
        cores=tuple(known.get(number) or Core(number, 1.0, frozenset({number})) for number in sorted(allowed)),
        quota_cores=min(quotas, default=None),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


def cpu_flags(cpuinfo: Path = PROC_CPUINFO) -> frozenset[str]:
    """The instruction sets of the first core, as Linux names them: ``flags`` on x86-64, ``Features`` on arm64."""
    for line in _read(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _v2_quotas(root: Path, membership: Path) -> list[float]:
    """``cpu.max`` of cgroup v2 (kernel: admin-guide/cgroup-v2.rst), "quota period" or "max period"."""
    group = _group(membership, "")
    found = []
    for folder in _upwards(root, group) if group is not None else ():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            found.append(int(quota) / int(period))
    return found


def _v1_quotas(root: Path, membership: Path) -> list[float]:
    """``cpu.cfs_quota_us`` of cgroup v1 (kernel: scheduler/sched-bwc.rst); -1 is no limit."""
    group = _group(membership, "cpu")
    found = []
    for mount in (root / "cpu", root / "cpu,cpuacct"):
        for folder in _upwards(mount, group) if group is not None else ():
            quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
            if quota.isdigit() and period.isdigit():
                found.append(int(quota) / int(period))
    return found


def available_memory(
    root: Path = CGROUP_ROOT, membership: Path = PROC_CGROUP, meminfo: Path = PROC_MEMINFO
) -> int | None:
    """Bytes that processes of ours may still take without swapping; None where the system does not say.

    The kernel's own estimate (proc(5), ``MemAvailable``), and under a cgroup's memory limit what that leaves.
    """
    rooms = [*_v2_memory(root, membership), *_v1_memory(root, membership)]
    lines = _read(meminfo).splitlines()
    rooms.extend(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min(rooms)) if rooms else None


def _v2_memory(root: Path, membership: Path) -> list[int]:
    """What each ``memory.max`` of cgroup v2 leaves; file pages that nobody used lately can be had."""
    group = _group(membership, "")
    folders = _upwards(root, group) if group is not None else ()
    return _left(folders, "memory.max", "memory.current", "inactive_file")


def _v1_memory(root: Path, membership: Path) -> list[int]:
    """The same of cgroup v1 (kernel: admin-guide/cgroup-v1/memory.rst)."""
    group = _group(membership, "memory")
    folders = _upwards(root / "memory", group) if group is not None else ()
    return _left(folders, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(folders: Iterable[Path], limit_file: str, usage_file: str, reclaimable_key: str) -> list[int]:
    found = []
    for folder in folders:
        limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
        if limit.isdigit() and usage.isdigit():  # v2 says "max" for none, v1 a number beyond any machine
            stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
            found.append(int(limit) - int(usage) + int(stat.get(reclaimable_key, 0)))
    return found


def _group(membership: Path, controller: str) -> str | None:
    """Our path in the hierarchy of a controller; "" names the unified one."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _upwards(mount: Path, group: str) -> list[Path]:
    folder = mount / group.strip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
