"""Keeps processes where it was decided: each in a cgroup of its own, or, where that cannot be, by affinity and nice.

The part of the cgroup v2 tree that was delegated to us (kernel: admin-guide/cgroup-v2.rst) becomes::

    edged.service/            the controllers are enabled for its children, so no process may be in it
    ├── daemon/               this process
    ├── chat-1234/            one for each worker, named after its process
    └── embed-1235/

All here blocks: the kernel may take a while to move a process.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from edged.errors import ConfinementError
from edged.hardware.cores import format_list, read_online
from edged.hardware.placement import Bounds

MOUNT: Final = Path("/sys/fs/cgroup")
PROC: Final = Path("/proc")
LEAF: Final = "daemon"
NEEDED: Final = ("cpuset", "cpu", "memory", "pids")
FILES: Final = ("cpuset.cpus", "cpu.max", "cpu.weight", "memory.high", "memory.max", "memory.oom.group", "pids.max")
WELCOME: Final = ("io",)
PERIOD_MICROSECONDS: Final = 100_000
LEAST_QUOTA_MICROSECONDS: Final = 1_000  # the kernel takes no less
NICEST: Final = 19
STOPPED_PERIODS: Final = 3
"""A process that the quota stopped in so many periods between two looks is too much for its quota."""


DriftKind = Literal["affinity", "group", "limits", "stopped"]


class Drift(msgspec.Struct, frozen=True):
    """Something that is not as it was decided.

    ``affinity``: threads may run on other cores. ``group``: the process is in another cgroup. ``limits``: its cgroup
    has others. ``stopped``: the CPU quota stops it again and again; this alone cannot be repaired here.
    """

    kind: DriftKind
    text: str


class Actual(msgspec.Struct, frozen=True, kw_only=True):
    """What is. ``limits`` are the contents of the cgroup's files; ``stops`` counts periods in which the quota
    stopped the process, or a group that it is in."""

    cores: Mapping[int, frozenset[int]]
    group: str = ""
    limits: Mapping[str, str] = {}
    stops: int = 0


# --- decisions, pure -------------------------------------------------------------------------------


def limits_of(bounds: Bounds) -> dict[str, str]:
    """What is to be in the files of a process's cgroup; the part before the dot is the controller."""
    period = PERIOD_MICROSECONDS
    quota = None if bounds.quota_cores is None else max(LEAST_QUOTA_MICROSECONDS, int(bounds.quota_cores * period))
    return {
        "cpuset.cpus": format_list(bounds.cores),
        "cpu.max": f"{_or_max(quota)} {period}",
        "cpu.weight": str(bounds.weight),
        "memory.high": _or_max(bounds.memory_high),
        "memory.max": _or_max(bounds.memory_max),
        "memory.oom.group": "1",
        "pids.max": _or_max(bounds.tasks_max),
    }


def drifts(
    bounds: Bounds, found: Actual, *, group: str, limits: Mapping[str, str], online: frozenset[int], stops_before: int
) -> Iterator[Drift]:
    """How what was ``found`` differs from bounds, ``group`` and ``limits``, on the cores that are online."""
    allowed = frozenset(bounds.cores) & online
    strays = [cores for cores in found.cores.values() if cores != allowed]
    if allowed and strays and not _is_one_each(strays, allowed):
        yield Drift("affinity", f"{len(strays)} threads may run on {_cores(strays[0])}, not on {_cores(allowed)}")
    if found.group != group:
        yield Drift("group", f"it is in the cgroup {found.group}, not in {group}")
    for file, content in limits.items():
        if found.limits.get(file) != content:
            yield Drift("limits", f"{file} is {found.limits.get(file, 'missing')}, not {content}")
    stopped = found.stops - stops_before
    if stopped >= STOPPED_PERIODS and (bounds.quota_cores is None or bounds.threads <= bounds.quota_cores):
        yield Drift("stopped", f"a CPU quota stopped it in {stopped} periods since the last look")


def _is_one_each(strays: Iterable[frozenset[int]], allowed: frozenset[int]) -> bool:
    """A worker may give each of its computing threads one of its cores."""
    return sorted(map(sorted, strays)) == [[core] for core in sorted(allowed)]


def _cores(numbers: frozenset[int]) -> str:
    return f"cores {format_list(numbers)}"


def _or_max(value: int | None) -> str:
    return "max" if value is None else str(value)


Write = Callable[[Path, str], None]


def write_file(file: Path, text: str) -> None:
    """To one of the kernel's files: one write is one order. Raises ``OSError`` where it refuses."""
    file.write_text(text, encoding="ascii")


def try_each(steps: Iterable[Callable[[], object]]) -> None:
    """Take each, whatever becomes of the others. Raises the first refusal (``OSError``) once all were tried."""
    refusals: list[OSError] = []
    for step in steps:
        try:
            step()
        except OSError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


# --- the tree --------------------------------------------------------------------------------------


class Tree:
    """The cgroups that are ours. Use :meth:`claim`.

    ``missing`` are controllers that the system does not offer; ``lacking`` are files that those it offers do not have
    (``cpu.max`` is not there without CONFIG_CFS_BANDWIDTH).
    """

    def __init__(self, base: Path, mount: Path, controllers: frozenset[str], write: Write) -> None:
        self._base = base
        self._mount = mount
        self._write = write
        self.controllers = controllers
        self.missing = tuple(name for name in NEEDED if name not in controllers)
        self.lacking = frozenset(
            file for file in FILES if _controller(file) in controllers and not (base / LEAF / file).exists()
        )
        self._quotas = {folder: _read_or_empty(folder / "cpu.max") for folder in self._above()}
        self._stopped_by_plan: dict[Path, int] = {}

    @classmethod
    def claim(cls, mount: Path = MOUNT, proc: Path = PROC, write: Write = write_file) -> "Tree":
        """Move this process into a leaf and enable the controllers for its brothers.

        Raises :class:`ConfinementError` where there is no cgroup v2, or our cgroup is not ours alone.
        """
        if not (mount / "cgroup.controllers").is_file():
            raise ConfinementError(f"no cgroup v2 at {mount}", hint="boot with systemd.unified_cgroup_hierarchy=1")
        own = mount / group_of(os.getpid(), proc).strip("/")
        base = own.parent if own.name == LEAF else own
        tree = cls(base, mount, frozenset(), write)
        try:
            _check_delegated(base, own)
            tree._enter_leaf()
            return cls(base, mount, _enable(base, write), write)
        except OSError as error:
            tree.release()
            raise ConfinementError(f"the cgroup {base} cannot be used: {error}", hint=DELEGATE_HINT) from error

    @property
    def pressure_file(self) -> Path:
        """Memory pressure of all that is ours."""
        return self._base / "memory.pressure"

    def group(self, name: str) -> str:
        """The path of a cgroup as ``/proc/<pid>/cgroup`` shows it."""
        return f"/{(self._base / name).relative_to(self._mount)}"

    def limit(self, name: str, limits: Mapping[str, str]) -> None:
        """Make the cgroup where it is not there, and write to those of its files that there are.

        Raises ``OSError`` where one is refused; the others are written all the same.
        """
        folder = self._base / name
        folder.mkdir(exist_ok=True)
        try_each(
            functools.partial(self._write, folder / file, content) for file, content in self.offered(limits).items()
        )

    def adopt(self, name: str, pid: int) -> None:
        """Move a process, with all its threads, into a cgroup. Memory it has already stays charged where it was."""
        self._write(self._base / name / "cgroup.procs", str(pid))

    def offered(self, limits: Mapping[str, str]) -> dict[str, str]:
        """Those of the limits that the kernel can set here."""
        return {
            file: content
            for file, content in limits.items()
            if _controller(file) in self.controllers and file not in self.lacking
        }

    def read(self, name: str, files: Iterable[str]) -> dict[str, str]:
        """What those of these files of a cgroup contain that are there."""
        folder = self._base / name
        return {file: _read(folder / file) for file in files if (folder / file).exists()}

    def stops(self, name: str) -> int:
        """Periods in which a quota stopped this cgroup, or one that it is in (``nr_throttled``).

        Quotas around us that were there when we came are part of the plan, and what they stop does not count.
        """
        stops = _stops(self._base / name)
        for folder, quota in self._quotas.items():
            if _read_or_empty(folder / "cpu.max") == quota:
                self._stopped_by_plan[folder] = _stops(folder)
            else:
                stops += _stops(folder) - self._stopped_by_plan.get(folder, 0)
        return stops

    def memory_kills(self, name: str) -> int:
        """Processes of this cgroup that were killed because it was out of memory."""
        return _keyed(self._base / name / "memory.events").get("oom_kill", 0)

    def names(self) -> list[str]:
        """All cgroups of workers, also those left by an earlier daemon."""
        return sorted(folder.name for folder in self._base.iterdir() if folder.is_dir() and folder.name[-1].isdigit())

    def remove(self, name: str) -> bool:
        """Remove a cgroup; False while a process is in it, or was a moment ago."""
        try:
            (self._base / name).rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Give all back as far as it goes: once the workers have ended, we are where we were."""
        for name in self.names():
            self.remove(name)
        with contextlib.suppress(OSError):
            enabled = _read(self._base / "cgroup.subtree_control").split()
            self._write(self._base / "cgroup.subtree_control", " ".join(f"-{name}" for name in enabled))
            self._write(self._base / "cgroup.procs", str(os.getpid()))
        self.remove(LEAF)

    def _above(self) -> list[Path]:
        """Our own cgroup and those that it is in."""
        return [folder for folder in (self._base, *self._base.parents) if folder.is_relative_to(self._mount)]

    def _enter_leaf(self) -> None:
        (self._base / LEAF).mkdir(exist_ok=True)
        self.adopt(LEAF, os.getpid())


DELEGATE_HINT: Final = "run edged as the service that install-edge.sh makes (Delegate=yes)"


def _check_delegated(base: Path, own: Path) -> None:
    """A cgroup is ours when we may write to it and nobody else is in it: a login's or a container's is not."""
    if not all(os.access(base / file, os.W_OK) for file in (".", "cgroup.procs", "cgroup.subtree_control")):
        raise ConfinementError(f"the cgroup {base} was not delegated to edged", hint=DELEGATE_HINT)
    others = {int(pid) for folder in {base, own} for pid in _read(folder / "cgroup.procs").split()} - {os.getpid()}
    if others:
        raise ConfinementError(f"{len(others)} other processes are in the cgroup {base}", hint=DELEGATE_HINT)


def _enable(base: Path, write: Write) -> frozenset[str]:
    """One by one: a controller that is refused must not keep the others out."""
    offered = _read(base / "cgroup.controllers").split()
    for name in (*NEEDED, *WELCOME):
        if name in offered:
            with contextlib.suppress(OSError):
                write(base / "cgroup.subtree_control", f"+{name}")
    return frozenset(_read(base / "cgroup.subtree_control").split())


# --- processes -------------------------------------------------------------------------------------


class Confinement:
    """What was decided for which process, and whether it is so. Without a ``tree``: by affinity and nice alone.

    A worker may be put into its bounds in one thread while another one looks at all of them: neither sees the other's
    work half done.
    """

    def __init__(self, tree: Tree | None, proc: Path = PROC) -> None:
        self.tree = tree
        self._proc = proc
        self._decided: dict[int, tuple[str, Bounds]] = {}
        self._stops: dict[int, int] = {}
        self._lock = threading.RLock()

    def confine(self, name: str, pid: int, bounds: Bounds) -> None:
        """Put a process into its bounds; ``name`` is what it is for. What fails is found by the next :meth:`repair`."""
        group = LEAF if name == LEAF else f"{name}-{pid}"
        with self._lock, contextlib.suppress(OSError):
            self._decided[pid] = (group, bounds)
            self._apply(pid, group, bounds)

    def confine_anew(self, bounds: Callable[[str], Bounds]) -> None:
        """Put all there are into what ``bounds`` now says of what they are for; each keeps its own memory limits."""
        for pid, (group, old) in self._ours():
            name = group.partition("-")[0]
            kept = {"memory_high": old.memory_high, "memory_max": old.memory_max}
            self.confine(name, pid, msgspec.structs.replace(bounds(name), **kept))

    def repair(self) -> dict[int, list[Drift]]:
        """By process, what was not as decided; it is again now, but for what cannot be repaired here."""
        found: dict[int, list[Drift]] = {}
        for pid, (group, bounds) in self._ours():
            try:
                with self._lock, _gone_is_fine():
                    found[pid] = self._inspect(pid, group, bounds)
                    if any(drift.kind != "stopped" for drift in found[pid]):
                        self._apply(pid, group, bounds)
            except OSError as error:
                found[pid] = [*found.get(pid, ()), Drift("limits", f"cannot be put right: {error}")]
        return {pid: drifted for pid, drifted in found.items() if drifted}

    def group(self, pid: int) -> str:
        """The path of the cgroup that is a process's own; empty where it has none."""
        decided = self._decided.get(pid)
        return "" if decided is None or self.tree is None else self.tree.group(decided[0])

    def sweep(self) -> dict[int, int]:
        """Forget processes that are gone and remove their cgroups, also those of an earlier daemon.

        By process, how many were killed because its cgroup was out of memory.
        """
        with self._lock:
            for pid in [pid for pid in list(self._decided) if not self._is_ours(pid)]:
                del self._decided[pid]
                self._stops.pop(pid, None)
            return {} if self.tree is None else self._remove_left(self.tree)

    def _remove_left(self, tree: Tree) -> dict[int, int]:
        """Remove the cgroups that are nobody's; of which processes some were killed for memory, and how many."""
        kept = {group for group, _ in self._decided.values()}
        killed = {}
        for name in [name for name in tree.names() if name not in kept]:
            kills = tree.memory_kills(name)
            if tree.remove(name) and kills:
                killed[int(name.rpartition("-")[2])] = kills
        return killed

    def release(self, machine_cores: frozenset[int]) -> None:
        """Let this process run on all cores it could before, and leave its cgroup; workers have ended."""
        if os.getpid() in self._decided:
            _set_cores(self._proc, os.getpid(), machine_cores)
        self._decided.clear()
        if self.tree is not None:
            self.tree.release()

    def _ours(self) -> list[tuple[int, tuple[str, Bounds]]]:
        return [(pid, decided) for pid, decided in list(self._decided.items()) if self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        """This process or a child of it: a number may be given to another process as soon as ours has ended."""
        try:
            stat = (self._proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return False
        parent = int(stat[stat.rindex(")") + 2 :].split()[1])
        return os.getpid() in (pid, parent)

    def _apply(self, pid: int, group: str, bounds: Bounds) -> None:
        """All of it that can be had: one limit that is refused must not leave a worker on the daemon's cores."""
        steps: list[Callable[[], object]] = []
        if self.tree is not None:
            steps.append(functools.partial(self.tree.limit, group, limits_of(bounds)))
            steps.append(functools.partial(self.tree.adopt, group, pid))
        # Also beside a cpuset: the worker inherited the daemon's affinity, and taskset may have changed it since.
        steps.append(functools.partial(_set_cores, self._proc, pid, frozenset(bounds.cores)))
        if self.tree is None or "cpu" not in self.tree.controllers:
            steps.append(functools.partial(_be_nice, pid, bounds.nice))
        try_each(steps)

    def _inspect(self, pid: int, group: str, bounds: Bounds) -> list[Drift]:
        found = Actual(cores={each: frozenset(os.sched_getaffinity(each)) for each in _threads(self._proc, pid)})
        path, limits = "", dict[str, str]()
        if self.tree is not None:
            path, limits = self.tree.group(group), self.tree.offered(limits_of(bounds))
            found = Actual(
                cores=found.cores,
                group=group_of(pid, self._proc),
                limits=self.tree.read(group, limits),
                stops=self.tree.stops(group),
            )
        before, self._stops[pid] = self._stops.get(pid, found.stops), found.stops
        return list(drifts(bounds, found, group=path, limits=limits, online=read_online(), stops_before=before))


def group_of(pid: int, proc: Path = PROC) -> str:
    """The cgroup v2 path of a process."""
    for line in (proc / str(pid) / "cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    return ""


def _set_cores(proc: Path, pid: int, cores: frozenset[int]) -> None:
    # The main thread last: a worker that sees its affinity changed places the others anew (edged.engine.affinity).
    for thread in reversed(_threads(proc, pid)):
        with _gone_is_fine():
            os.sched_setaffinity(thread, cores)


def _be_nice(pid: int, nice: int) -> None:
    """So much nicer than this process; the way back is not everybody's."""
    wanted = min(NICEST, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    if os.getpriority(os.PRIO_PROCESS, pid) < wanted:
        os.setpriority(os.PRIO_PROCESS, pid, wanted)


def _threads(proc: Path, pid: int) -> list[int]:
    return [int(folder.name) for folder in (proc / str(pid) / "task").iterdir()]


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    """A process may end at any moment, and its threads sooner."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        yield


def _controller(file: str) -> str:
    return file.partition(".")[0]


def _stops(folder: Path) -> int:
    return _keyed(folder / "cpu.stat").get("nr_throttled", 0)


def _keyed(file: Path) -> dict[str, int]:
    """A flat-keyed file of the kernel: lines of a name and a number."""
    try:
        return {name: int(value) for name, value in (line.split() for line in _read(file).splitlines())}
    except FileNotFoundError:
        return {}


def _read(file: Path) -> str:
    return file.read_text(encoding="ascii").strip()


def _read_or_empty(file: Path) -> str:
    try:
        return _read(file)
    except OSError:  # the root has no such file, and a kernel without quotas none at all
        return ""
