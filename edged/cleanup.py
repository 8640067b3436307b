"""Removes what a daemon that was killed may leave behind: sockets, worker processes, cgroups. Idempotent.

Runs before the daemon starts and after it has ended. While a daemon runs it does nothing: that one holds its home.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edged.config import Config
from edged.errors import HomeInUseError
from edged.runtime.home import hold_home

PROC = Path("/proc")
CGROUP_ROOT = Path("/sys/fs/cgroup")
CONTROL_GROUP = ".control"  # where systemd runs what a delegated unit does before its start and after its end


class Removed(msgspec.Struct, frozen=True):
    """What was there and is gone. ``held`` says that a daemon runs, so that nothing was looked for."""

    sockets: tuple[str, ...] = ()
    workers: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    held: bool = False


def clean_up(config: Config, *, proc: Path = PROC, cgroup_root: Path = CGROUP_ROOT) -> Removed:
    """Remove what nobody uses any more. Raises :class:`EdgedError` when the home cannot be used at all."""
    if not config.run_dir.exists():
        return Removed()
    try:
        with hold_home(config):
            return Removed(
                workers=tuple(_end_workers(config.run_dir, proc)),
                sockets=tuple(_unlink_sockets(config)),
                groups=tuple(_remove_groups(proc, cgroup_root)),
            )
    except HomeInUseError:
        return Removed(held=True)


def _unlink_sockets(config: Config) -> Iterator[str]:
    left = [config.profile_socket] if config.profile_socket.exists() else []
    for path in [*sorted(config.run_dir.glob("*.sock")), *left]:
        path.unlink(missing_ok=True)
        yield path.name


# --- workers ---------------------------------------------------------------------------------------


def _end_workers(run_dir: Path, proc: Path) -> Iterator[int]:
    """Kill the workers of this home, whose daemon is gone: its lock is ours.

    Who they are is read from the process itself while a descriptor of it is held, so that a process id that was
    given anew hits nobody.
    """
    for entry in proc.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError), _descriptor(int(entry.name)) as process:
            if _is_worker(entry, run_dir):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                yield int(entry.name)


@contextlib.contextmanager
def _descriptor(pid: int) -> Iterator[int]:
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)


def _is_worker(entry: Path, run_dir: Path) -> bool:
    """Whether it was started as ``… <run_dir>/NAME.sock {settings}``: see :mod:`edged.workers.process`."""
    try:
        arguments = (entry / "cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:  # it has ended
        return False
    if len(arguments) < 3 or not arguments[-1].startswith(b"{"):
        return False
    socket_path = Path(os.fsdecode(arguments[-2]))
    return socket_path.parent == run_dir and socket_path.suffix == ".sock"


# --- cgroups -----------------------------------------------------------------------------------------


def _remove_groups(proc: Path, cgroup_root: Path) -> Iterator[str]:
    """The empty groups that a daemon made below its unit's; the kernel keeps those with processes."""
    unit = _unit_group(proc, cgroup_root)
    if unit is None:
        return
    for folder, _, _ in os.walk(unit, topdown=False):
        if folder == str(unit) or CONTROL_GROUP in Path(folder).parts:
            continue
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
            yield str(Path(folder).relative_to(unit))


def _unit_group(proc: Path, cgroup_root: Path) -> Path | None:
    """The unit's group, where this process is what systemd runs beside it in ``.control``: cgroups(7), version 2."""
    for line in (proc / "self/cgroup").read_text().splitlines():
        hierarchy, _, path = line.split(":", 2)
        group = cgroup_root / path.lstrip("/")
        if hierarchy == "0" and group.name == CONTROL_GROUP:
            return group.parent
    return None
