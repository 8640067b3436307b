"""What cgroups v2 and the kernel's pressure accounts tell: admin-guide/cgroup-v2.rst, accounting/psi.rst."""

from pathlib import Path
from typing import Final

import msgspec

from edged.probe.procfs import PROC, Transferred, read_file

MOUNT: Final = Path("/sys/fs/cgroup")
RESOURCES: Final = ("cpu", "memory", "io")


class Periods(msgspec.Struct, frozen=True):
    """Periods of a CPU quota so far, and those in which it stopped the group."""

    all: int
    stopped: int


def has_groups(mount: Path = MOUNT) -> bool:
    """Whether cgroups v2 are mounted, with a controller that measures."""
    return bool({"cpu", "memory", "io"} & set(read_file(mount / "cgroup.controllers").split()))


def periods_of(group: str, mount: Path = MOUNT) -> list[Periods]:
    """Of a group and of all that it is in, where they have a quota to begin with."""
    folder = mount / group.strip("/")
    inside = [each for each in (folder, *folder.parents) if each.is_relative_to(mount)]
    stats = [_numbers(each / "cpu.stat") for each in inside] if group else []
    return [Periods(stat["nr_periods"], stat["nr_throttled"]) for stat in stats if "nr_periods" in stat]


def stopped_share(before: Periods, now: Periods) -> float:
    """Of the periods between two readings, 0 to 1."""
    return (now.stopped - before.stopped) / (now.all - before.all) if now.all > before.all else 0.0


def transferred_by(group: str, mount: Path = MOUNT) -> Transferred | None:
    """Bytes that block devices read and wrote for a group so far; None where nobody counts them."""
    file = mount / group.strip("/") / "io.stat"
    if not group or not file.exists():
        return None
    pairs = (word.partition("=") for word in read_file(file).split())
    sums = {"rbytes": 0, "wbytes": 0}
    for name, _, value in pairs:
        if name in sums:
            sums[name] += int(value)
    return Transferred(sums["rbytes"], sums["wbytes"])


def stalled_seconds(proc: Path = PROC) -> dict[str, float]:
    """How long some process waited for each resource since the boot; empty where nobody counts it."""
    found = {}
    for resource in RESOURCES:
        for line in read_file(proc / "pressure" / resource).splitlines():
            if line.startswith("some "):
                found[resource] = int(line.rpartition("total=")[2]) / 1e6
    return found


def _numbers(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in read_file(file).splitlines())}
