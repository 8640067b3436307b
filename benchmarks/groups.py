"""Control groups for a benchmark, made for a while and removed again: a CPU quota, a weight, cores. By root.

With cgroup v2 where it has the cpu controller (kernel: admin-guide/cgroup-v2.rst), else with v1 (scheduler/
sched-bwc.rst, admin-guide/cgroup-v1/cpusets.rst), in whose terms the same limits are told. With v2 the controllers that
are enabled at the root stay so.
"""

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from edged.hardware.cores import format_list
from edged.workers.cgroup import NEEDED

ROOT = Path("/sys/fs/cgroup")
PERIOD_MICROSECONDS = 100_000
USUAL_WEIGHT = 100
USUAL_SHARES = 1024
REMOVE_SECONDS = 10.0
POLL_SECONDS = 0.05

Version = Literal[1, 2]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a group may use: so many cores' time, its ``weight`` in cgroup v2's terms, these ``cores``; None: all."""

    quota_cores: float | None = None
    weight: int = USUAL_WEIGHT
    cores: tuple[int, ...] | None = None


def files(limits: Limits, version: Version) -> dict[str, str]:
    """What to write where a new group is to differ from others; the part before the dot is the controller."""
    quota = None if limits.quota_cores is None else round(limits.quota_cores * PERIOD_MICROSECONDS)
    found: dict[str, str] = {}
    if quota is not None and version == 2:
        found["cpu.max"] = f"{quota} {PERIOD_MICROSECONDS}"
    if quota is not None and version == 1:
        found["cpu.cfs_period_us"] = str(PERIOD_MICROSECONDS)
        found["cpu.cfs_quota_us"] = str(quota)
    if limits.weight != USUAL_WEIGHT and version == 2:
        found["cpu.weight"] = str(limits.weight)
    if limits.weight != USUAL_WEIGHT and version == 1:
        found["cpu.shares"] = str(limits.weight * USUAL_SHARES // USUAL_WEIGHT)
    if limits.cores is not None:
        found["cpuset.cpus"] = format_list(limits.cores)
    return found


def version(root: Path = ROOT) -> Version:
    """Which one has the cpu controller. Ends the program where neither has."""
    if "cpu" in _words(root / "cgroup.controllers"):
        return 2
    if _mount(root, "cpu").is_dir():
        return 1
    raise SystemExit(f"no cgroup controller for the CPU under {root}")


def services(root: Path = ROOT) -> str:
    """Where a program of the system lives: in systemd's group for services, with cgroup v2, or at the root."""
    return "system.slice/" if version(root) == 2 and (root / "system.slice").is_dir() else ""


class Group:
    """A group, in one folder with cgroup v2 and in one of each controller with v1. Use :func:`made`."""

    def __init__(self, name: str, limits: Limits, root: Path) -> None:
        self._root = root
        self._version = version(root)
        self._files = files(limits, self._version)
        controllers = dict.fromkeys(["cpu", *(file.partition(".")[0] for file in self._files)])
        mounts = {each: root if self._version == 2 else _mount(root, each) for each in controllers}
        self._folders = {controller: mount / name for controller, mount in mounts.items()}

    @property
    def launcher(self) -> tuple[str, ...]:
        """Put before a command, it is run in the group from its start, as the process that was started."""
        join = "".join(f"echo $$ > {shlex.quote(str(file))} && " for file in self._members())
        return ("sh", "-c", f'{join}exec "$@"', "sh")

    def adopt(self, pid: int) -> None:
        """Move a process that runs."""
        for file in self._members():
            file.write_text(str(pid))

    def signal(self, number: signal.Signals) -> None:
        """To all processes in it, also those in groups that were made in it."""
        for folder, _, _ in os.walk(self._folders["cpu"]):
            for pid in (Path(folder) / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)

    def make(self) -> None:
        """Make it and set its limits."""
        if self._version == 2:
            self._enable(self._folders["cpu"].parent)
        for controller, folder in self._folders.items():
            folder.mkdir(exist_ok=True)
            if self._version == 1 and controller == "cpuset":  # without memory nobody may enter
                (folder / "cpuset.mems").write_text((folder.parent / "cpuset.mems").read_text())
        for file, content in self._files.items():
            (self._folders[file.partition(".")[0]] / file).write_text(content)

    def remove(self) -> None:
        """With the groups that were made in it. What has just ended may be in it for a moment."""
        for top in set(self._folders.values()):
            for folder, _, _ in os.walk(top, topdown=False):
                _remove(Path(folder))

    def _members(self) -> list[Path]:
        return [folder / "cgroup.procs" for folder in dict.fromkeys(self._folders.values())]

    def _enable(self, parent: Path) -> None:
        """What is limited works when all above let it through; edged is offered all that systemd would give it."""
        limited = {file.partition(".")[0] for file in self._files}
        above = [folder for folder in (parent, *parent.parents) if folder.is_relative_to(self._root)]
        for folder in reversed(above):
            wanted = NEEDED if folder == self._root else limited
            offered, enabled = (_words(folder / f"cgroup.{file}") for file in ("controllers", "subtree_control"))
            if missing := [f"+{each}" for each in wanted if each in offered and each not in enabled]:
                (folder / "cgroup.subtree_control").write_text(" ".join(missing))


@contextlib.contextmanager
def made(name: str, limits: Limits, root: Path = ROOT) -> Iterator[Group]:
    """A group; whoever was started in it must have ended when this does."""
    group = Group(name, limits, root)
    try:
        group.make()
        yield group
    finally:
        group.remove()


def _remove(folder: Path) -> None:
    end = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(POLL_SECONDS)


def _mount(root: Path, controller: str) -> Path:
    """Of cgroup v1; the cpu controller has another name where it is mounted together with cpuacct."""
    together = root / f"{controller},cpuacct"
    return together if together.is_dir() else root / controller


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.is_file() else []
