"""The cores of this machine and how fast they are beside each other, from sysfs.

Kernel: ABI/testing/sysfs-devices-system-cpu, admin-guide/cputopology.rst.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

SYSFS_CPU = Path("/sys/devices/system/cpu")


class Core(msgspec.Struct, frozen=True):
    """A logical core that is online.

    ``speed`` is its computing power beside that of the fastest, in (0, 1]; ``siblings`` are the numbers of all logical
    cores of the same physical one, its own among them.
    """

    number: int
    speed: float
    siblings: frozenset[int]


def read_cores(root: Path = SYSFS_CPU) -> tuple[Core, ...]:
    """The cores that are online, by number.

    Their speed is the scheduler's own measure (``cpu_capacity``, of arm64 and newer kernels), else the highest
    frequency; where the system says neither of every core, they count as equal.
    """
    numbers = sorted(read_online(root))
    folders = {number: root / f"cpu{number}" for number in numbers}
    speeds = _speeds(folders, "cpu_capacity") or _speeds(folders, "cpufreq/cpuinfo_max_freq")
    fastest = max(speeds.values(), default=1)
    return tuple(
        Core(number, speeds.get(number, fastest) / fastest, _siblings(folder, number))
        for number, folder in folders.items()
    )


def read_online(root: Path = SYSFS_CPU) -> frozenset[int]:
    """Their numbers alone; none where the system does not say."""
    return parse_list(_read(root / "online"))


def parse_list(text: str) -> frozenset[int]:
    """The kernel's list format: ``0-3,6`` is 0, 1, 2, 3 and 6."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def format_list(numbers: Iterable[int]) -> str:
    """The same, written: ``0-3,6``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][-1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _speeds(folders: dict[int, Path], file: str) -> dict[int, int]:
    """The number in a file of each core; nothing unless every core has one."""
    found = {number: _read(folder / file).strip() for number, folder in folders.items()}
    return {number: int(text) for number, text in found.items()} if all(map(str.isdigit, found.values())) else {}


def _siblings(folder: Path, number: int) -> frozenset[int]:
    return parse_list(_read(folder / "topology" / "thread_siblings_list")) | {number}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
