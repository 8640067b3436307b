"""What a process uses of the machine's memory, from proc(5)."""

import os
from pathlib import Path

import msgspec

PROC = Path("/proc")


class Usage(msgspec.Struct, frozen=True):
    """Memory of a process in RAM, and its page faults so far.

    ``major_faults`` had to wait for the disk: a mapped model's pages that were not, or no longer, in memory.
    """

    resident_bytes: int
    minor_faults: int
    major_faults: int


def read_usage(pid: int, proc: Path = PROC) -> Usage | None:
    """The usage of a process now; None when it is gone. The kernel makes the file up: no disk is waited for."""
    try:
        stat = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parse_stat(stat, page_bytes=os.sysconf("SC_PAGE_SIZE"))


def parse_stat(stat: str, *, page_bytes: int) -> Usage:
    """A line of ``/proc/<pid>/stat``. The name in parentheses may hold anything, spaces and parentheses too."""
    fields = stat[stat.rindex(")") + 2 :].split()  # from field 3, the state, on
    return Usage(
        resident_bytes=int(fields[24 - 3]) * page_bytes,
        minor_faults=int(fields[10 - 3]),
        major_faults=int(fields[12 - 3]),
    )
