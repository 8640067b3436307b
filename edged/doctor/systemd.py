"""What systemd says of edged's units."""

import contextlib
import os
import pwd
from collections.abc import Iterable
from pathlib import Path

from edged.config import split_listen
from edged.doctor.device import Device

UNIT = "edged.service"
SOCKET = "edged.socket"
LISTENING = "SubState=listening"
"""Of a socket: a connection would start its service."""


def show(device: Device, unit: str, names: Iterable[str]) -> dict[str, str]:
    """Properties as ``systemctl show`` has them; empty where systemd does not run or does not answer."""
    return dict(line.split("=", 1) for line in _said(device, unit, names) if "=" in line)


def user_of_unit(device: Device) -> str | None:
    """The user whom the service runs as; None where it is not installed."""
    unit = show(device, UNIT, ("LoadState", "User"))
    return (unit.get("User") or "root") if unit.get("LoadState") == "loaded" else None


def makes(device: Device, folder: Path) -> bool:
    """Whether systemd makes the folder when the service starts."""
    states = show(device, UNIT, ("StateDirectory",)).get("StateDirectory", "").split()
    return any(folder == Path("/var/lib", name) for name in states)


def is_me(user: str) -> bool:
    """Whether the doctor runs as this user."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(user).pw_uid == os.geteuid()
    return False


def main_pid(device: Device) -> int | None:
    """The daemon's process, also while it starts; None where the service does not run."""
    pid = show(device, UNIT, ("MainPID",)).get("MainPID", "0")
    return int(pid) if pid not in ("", "0") else None


def memory_limits(device: Device) -> list[int] | None:
    """Bytes that the service may take, by each limit that it has; None where it is not installed."""
    unit = show(device, UNIT, ("LoadState", "MemoryHigh", "MemoryMax"))
    if unit.get("LoadState") != "loaded":
        return None
    return [int(unit[name]) for name in ("MemoryHigh", "MemoryMax") if unit.get(name, "").isdigit()]


def would_start_edged(device: Device) -> bool:
    """Whether a connection to ``http.listen`` makes systemd start the service."""
    said = _said(device, SOCKET, ("SubState", "Listen"))
    port = split_listen(device.config.http.listen)[1]
    is_held = any(line.startswith("Listen=") and f":{port} (" in line for line in said)
    return is_held and LISTENING in said and main_pid(device) is None


def _said(device: Device, unit: str, names: Iterable[str]) -> list[str]:
    """A line for each property; one that is a list has several."""
    if not device.path("run/systemd/system").is_dir():
        return []
    with contextlib.suppress(TimeoutError):
        return (device.run(["systemctl", "show", unit, f"--property={','.join(names)}"]) or "").splitlines()
    return []
