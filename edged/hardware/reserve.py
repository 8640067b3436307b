"""Keeps other programs off cores: a cpuset of ours confines us and keeps nobody out, so the others get one as well."""

import subprocess
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Final

from edged.errors import ConfinementError
from edged.hardware.cores import format_list, parse_list, read_online

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
OTHERS: Final = ("system.slice", "user.slice")
RECORD: Final = Path("/run/edged-reserved")
"""Is there while the others are kept off by us; root's, and gone with the next boot as the restriction is."""
TIMEOUT_SECONDS: Final = 10.0


def is_reserved(cores: Set[int], root: Path = CGROUP_ROOT) -> bool:
    """Whether services and logins are kept off these cores already."""
    return not any(cores & allowed or not allowed for allowed in (_allowed(root / unit) for unit in OTHERS))


def reserve(left: Iterable[int]) -> None:
    """Leave services and logins these cores alone, until :func:`free` or the next boot. Blocks.

    Raises :class:`ConfinementError` with systemd's words.
    """
    try:
        RECORD.touch()
    except OSError as error:
        raise ConfinementError(f"only root can keep others off cores: {error}") from error
    _allow(format_list(left))


def free() -> None:
    """Give them all cores again where :func:`reserve` took some. Raises :class:`ConfinementError`.

    All of them by name first: systemd 252 leaves what the kernel was told where a property is merely taken back while
    some unit has delegated groups.
    """
    if RECORD.exists():
        _allow(format_list(read_online()))
        _allow("")
        RECORD.unlink()


def _allowed(folder: Path) -> frozenset[int]:
    """None where a group has no cpuset: it may run anywhere then."""
    try:
        return parse_list((folder / "cpuset.cpus.effective").read_text(encoding="ascii"))
    except OSError:
        return frozenset()


def _allow(cores: str) -> None:
    for unit in OTHERS:
        command = ["systemctl", "set-property", "--runtime", unit, f"AllowedCPUs={cores}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfinementError(f"systemd cannot be asked: {error}") from error
        if done.returncode != 0:
            raise ConfinementError(f"systemd refuses AllowedCPUs of {unit}: {done.stderr.strip()}")
