"""Memory that is kept from being swapped out: the limit of it before loading, the amount after (mlock(2))."""

import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def raise_limit() -> None:
    """Let this process lock as much as it may be allowed to: the soft limit is often far below the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def locked_bytes(status: Path = STATUS) -> int:
    """What this process has locked: ``VmLck`` of proc(5)."""
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1]) * 1024
    return 0
