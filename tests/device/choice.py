"""Which boards a run tests on, and whether there is time for another test: decisions, from facts read once."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.device.board import Architecture
from tests.device.bundle import TARGETS

SCRIPTS = Path(__file__).parents[2] / "scripts"
GIGABYTE = 1 << 30
DISK_BYTES = 12 * GIGABYTE
"""An image while it is made, a bundle and its copies, an installed disk, what boards write."""
MEMORY_BYTES = 3 * GIGABYTE
CORES = 2

# Of a machine with two cores that does nothing else, in minutes; the longest of each.
MAKING_IMAGE = {"amd64": 5.0, "arm64": 20.0}
COMPILING_WHEEL = 9.0
INSTALLING = {"amd64": 6.5, "arm64": 10.0}
ONE_TEST = {"amd64": 3.0, "arm64": 5.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the machine has: free bytes, and of each board whether its image and its wheel are in the cache."""

    is_root: bool
    cores: int
    disk_bytes: int
    memory_bytes: int
    images: frozenset[Architecture]
    wheels: frozenset[Architecture]


def read_facts() -> Facts:
    return Facts(
        is_root=os.geteuid() == 0,
        cores=len(os.sched_getaffinity(0)),
        disk_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        memory_bytes=_available_memory(),
        images=frozenset(board for board in TARGETS if _is_cached("board-image.sh", board)),
        wheels=frozenset(board for board in TARGETS if _is_cached("cross-wheel.sh", TARGETS[board])),
    )


def obstacle(board: Architecture, facts: Facts) -> str | None:
    """Why this machine cannot emulate the board; None where it can."""
    if board not in facts.images and not facts.is_root:
        return f"making the {board} board's image needs root"
    wanted = ((facts.cores, CORES, "cores"), (facts.disk_bytes // GIGABYTE, DISK_BYTES // GIGABYTE, "GB of free disk"))
    for there, needed, what in (*wanted, (facts.memory_bytes // GIGABYTE, MEMORY_BYTES // GIGABYTE, "GB of memory")):
        if there < needed:
            return f"a board needs {needed} {what}, and there are {there}"
    return None


def minutes_needed(
    board: Architecture,
    facts: Facts,
    begun: Iterable[Architecture],
    *,
    itself: float | None = None,
    preparing: float = 0.0,
) -> float:
    """For one more test, with all that the first one on a board, and the first of its module, make beforehand.

    ``itself`` are the minutes of a test that takes longer than others.
    """
    minutes = (ONE_TEST[board] if itself is None else itself) + preparing
    if board not in begun:
        minutes += INSTALLING[board]
        minutes += 0 if board in facts.images else MAKING_IMAGE[board]
        minutes += 0 if board in facts.wheels else COMPILING_WHEEL
    return minutes


def _is_cached(script: str, name: str) -> bool:
    return subprocess.run([SCRIPTS / script, "--cached", name], capture_output=True, check=False).returncode == 0


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
