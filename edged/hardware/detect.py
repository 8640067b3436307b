"""What this process may use of the machine: cores and CPU quota, from sched(7) and the cgroup files."""

import os
from pathlib import Path

import msgspec

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")


class Cpu(msgspec.Struct, frozen=True):
    """``cores`` this process may run on; ``quota_cores`` of time it may use (None: no limit)."""

    cores: int
    quota_cores: float | None


def cpu(root: Path = CGROUP_ROOT, membership: Path = PROC_CGROUP) -> Cpu:
    """Cores by the affinity mask, quota by the tightest limit from our cgroup up to the root."""
    quotas = [*_v2_quotas(root, membership), *_v1_quotas(root, membership)]
    return Cpu(len(os.sched_getaffinity(0)), min(quotas, default=None))


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
