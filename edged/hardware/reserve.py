"""Keeps other programs off cores: a cpuset of ours confines us and keeps nobody out, so the others get one as well."""

import subprocess
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Final

from edged.errors import ConfinementError
from edged.hardware.cores import format_list, parse_list, read_online

CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
OTHERS: Final = ("system.slice", "user.slice")
SERVICE: Final = "edged.service"
RECORD: Final = Path("/run/edged-reserved")
"""Is there while the others are kept off by us, with the cores that they were kept to before; root's, and gone with the
next boot as the restriction is."""
TIMEOUT_SECONDS: Final = 10.0


def is_reserved(cores: Set[int], root: Path = CGROUP_ROOT) -> bool:
    """Whether services and logins are kept off these cores already."""
    return not any(cores & allowed or not allowed for allowed in (_allowed(root / unit) for unit in OTHERS))


def reserve(left: Iterable[int]) -> None:
    """Leave services and logins these cores alone, until :func:`free` or the next boot. Blocks.

    Who was kept to fewer before stays so. Raises :class:`ConfinementError` with systemd's words.
    """
    left = frozenset(left)
    try:
        if not RECORD.exists():
            RECORD.write_text("".join(f"{unit} {_configured(unit)}\n" for unit in OTHERS))
        before = _recorded()
    except OSError as error:
        raise ConfinementError(f"only root can keep others off cores: {error}") from error
    for unit in OTHERS:
        _allow(unit, format_list(parse_list(before.get(unit, "")) & left or left))


def free() -> None:
    """Give them the cores again that they had before :func:`reserve`. Raises :class:`ConfinementError`.

    All of them by name first: systemd 252 leaves what the kernel was told where a property is merely taken back while
    some unit has delegated groups.
    """
    if RECORD.exists():
        before = _recorded()
        for unit in OTHERS:
            _allow(unit, before.get(unit) or format_list(read_online()))
        for unit in OTHERS:
            if not before.get(unit):
                _allow(unit, "")
        RECORD.unlink()


def _recorded() -> dict[str, str]:
    """The cores that somebody kept each unit to before we came."""
    return {unit: cores for unit, _, cores in (line.partition(" ") for line in RECORD.read_text().splitlines())}


def group_of_service() -> str:
    """The cgroup in which systemd runs edged, or will."""
    return "/" + _systemctl("show", "--property=Slice", "--value", SERVICE).strip() + f"/{SERVICE}"


def _configured(unit: str) -> str:
    """The cores that somebody keeps a unit to, in the kernel's list format; empty for nobody."""
    return _systemctl("show", "--property=AllowedCPUs", "--value", unit).strip().replace(" ", ",")


def _allowed(folder: Path) -> frozenset[int]:
    """Empty where a group has no cpuset: it may run anywhere then."""
    try:
        return parse_list((folder / "cpuset.cpus.effective").read_text(encoding="ascii"))
    except OSError:
        return frozenset()


def _allow(unit: str, cores: str) -> None:
    _systemctl("set-property", "--runtime", unit, f"AllowedCPUs={cores}")


def _systemctl(*order: str) -> str:
    try:
        done = subprocess.run(
            ["systemctl", *order], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfinementError(f"systemd cannot be asked: {error}") from error
    if done.returncode != 0:
        raise ConfinementError(f"systemd refuses {' '.join(order)}: {done.stderr.strip()}")
    return done.stdout
