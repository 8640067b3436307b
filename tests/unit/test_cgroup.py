"""Processes are kept where it was decided: on a cgroup tree that follows the kernel's rules, and without one.

The files are made up, the processes and their affinity are real. The kernel's own tree is used on the emulated boards
and in tests/integration/test_confinement.py.
"""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from edged.errors import ConfinementError
from edged.hardware.placement import Bounds
from edged.workers.cgroup import FILES, LEAF, Actual, Confinement, Drift, Tree, drifts, limits_of

SERVICE = "edged.slice/edged.service"
ALL = ("cpuset", "cpu", "io", "memory", "pids")
CORES = tuple(sorted(os.sched_getaffinity(0)))
BOUNDS = Bounds(
    cores=CORES[:1],
    threads=1,
    weight=500,
    nice=0,
    quota_cores=1.5,
    memory_high=64 << 20,
    memory_max=128 << 20,
    tasks_max=99,
)

needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="affinity cannot differ on one core")


class Kernel:
    """Directories and files like those of cgroup v2, and its rules for writing to them.

    No process may be in a group whose children have controllers, and a child has those files alone.
    """

    def __init__(self, folder: Path, controllers: tuple[str, ...] = ALL) -> None:
        self.mount = folder / "cgroup"
        self.proc = folder / "proc"
        self.refused: set[str] = set()
        self.without: set[str] = set()
        self.mkdir(SERVICE, controllers)
        (self.mount / "cgroup.controllers").write_text(" ".join(controllers))
        self.enter(os.getpid(), SERVICE)

    def mkdir(self, group: str, controllers: tuple[str, ...] = ()) -> None:
        folder = self.mount / group
        folder.mkdir(parents=True)
        for file, content in {"controllers": " ".join(controllers), "procs": "", "subtree_control": ""}.items():
            (folder / f"cgroup.{file}").write_text(content)

    def enter(self, pid: int, group: str) -> None:
        """A process appears."""
        folder = self.proc / str(pid)
        folder.mkdir(parents=True)
        for file in ("task", "stat"):
            (folder / file).symlink_to(f"/proc/{pid}/{file}")
        self._put(pid, group)

    def write(self, file: Path, text: str) -> None:
        group = str(file.parent.relative_to(self.mount))
        if file.name == "cgroup.procs":
            if (file.parent / "cgroup.subtree_control").exists() and self.read(group, "cgroup.subtree_control"):
                raise OSError(errno.EBUSY, "no process may be beside groups")
            self._put(int(text), group)
        elif file.name == "cgroup.subtree_control":
            self._control(group, text.split())
        else:
            controller = file.name.partition(".")[0]
            parent = str(file.parent.parent.relative_to(self.mount))
            if controller not in self.read(parent, "cgroup.subtree_control").split() or file.name in self.without:
                raise PermissionError(errno.EACCES, "no file can be made here", str(file))
            if file.name in self.refused:
                raise OSError(errno.EINVAL, "refused", str(file))
            file.write_text(text)

    def _control(self, group: str, orders: list[str]) -> None:
        if self.read(group, "cgroup.procs").split():
            raise OSError(errno.EBUSY, "processes are in the group")
        enabled = set(self.read(group, "cgroup.subtree_control").split())
        for order in orders:
            if order[1:] in self.refused:
                raise OSError(errno.EINVAL, order)
            (enabled.add if order[0] == "+" else enabled.discard)(order[1:])
        (self.mount / group / "cgroup.subtree_control").write_text(" ".join(sorted(enabled)))
        for file in set(FILES) - self.without:
            if file.partition(".")[0] in enabled:
                (self.mount / group / LEAF / file).touch()

    def _put(self, pid: int, group: str) -> None:
        for file in self.mount.rglob("cgroup.procs"):
            file.write_text(" ".join(each for each in file.read_text().split() if int(each) != pid))
        file = self.mount / group / "cgroup.procs"
        file.write_text(f"{file.read_text() if file.exists() else ''} {pid}")
        (self.proc / str(pid) / "cgroup").write_text(f"12:cpuset:/elsewhere\n0::/{group}\n")

    def read(self, group: str, file: str) -> str:
        return (self.mount / group / file).read_text().strip()

    def members(self, group: str) -> list[int]:
        return [int(pid) for pid in self.read(group, "cgroup.procs").split()]

    def claim(self) -> Tree:
        return Tree.claim(self.mount, self.proc, self.write)

    def end(self, group: str) -> None:
        """All processes of a group end; its files would not hinder the kernel's rmdir."""
        for file in (self.mount / group).iterdir():
            file.unlink()


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@contextlib.contextmanager
def sleeping() -> Iterator[int]:
    """A child that does nothing; its process id."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()


class Worker(NamedTuple):
    """A child that was confined, and its cgroup."""

    confinement: Confinement
    pid: int
    group: str


@pytest.fixture
def worker(kernel: Kernel) -> Iterator[Worker]:
    confinement = Confinement(kernel.claim(), kernel.proc)
    with sleeping() as pid:
        kernel.enter(pid, f"{SERVICE}/daemon")
        confinement.confine("chat", pid, BOUNDS)
        yield Worker(confinement, pid, f"{SERVICE}/chat-{pid}")


# --- what is ours ----------------------------------------------------------------------------------


def test_the_daemon_moves_into_a_leaf_before_it_enables_controllers(kernel: Kernel) -> None:
    tree = kernel.claim()
    assert kernel.members(f"{SERVICE}/daemon") == [os.getpid()]
    assert kernel.members(SERVICE) == []
    assert set(kernel.read(SERVICE, "cgroup.subtree_control").split()) == set(ALL)
    assert tree.missing == ()


def test_a_daemon_that_the_service_manager_put_into_the_leaf_finds_its_tree(kernel: Kernel) -> None:
    kernel.mkdir(f"{SERVICE}/daemon")
    kernel.write(kernel.mount / SERVICE / "daemon" / "cgroup.procs", str(os.getpid()))
    assert kernel.claim().group("x-1") == f"/{SERVICE}/x-1"


def test_controllers_that_the_system_does_not_offer_are_named(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, ("cpuset", "cpu", "pids"))  # as Raspberry Pi OS boots
    assert kernel.claim().missing == ("memory",)


def test_a_controller_that_is_refused_does_not_keep_the_others_out(kernel: Kernel) -> None:
    kernel.refused = {"cpu"}
    tree = kernel.claim()
    assert tree.missing == ("cpu",)
    assert tree.controllers == {"cpuset", "io", "memory", "pids"}


def test_a_file_that_the_kernel_does_not_have_is_named_and_all_else_holds(kernel: Kernel) -> None:
    kernel.without = {"cpu.max"}  # built without CONFIG_CFS_BANDWIDTH, as for Jetsons
    tree = kernel.claim()
    assert tree.missing == ()
    assert tree.lacking == {"cpu.max"}
    confinement = Confinement(tree, kernel.proc)
    with sleeping() as pid:
        kernel.enter(pid, f"{SERVICE}/daemon")
        confinement.confine("chat", pid, BOUNDS)
        assert kernel.members(f"{SERVICE}/chat-{pid}") == [pid]
        assert kernel.read(f"{SERVICE}/chat-{pid}", "memory.max") == str(128 << 20)
        assert confinement.repair() == {}


@needs_two_cores
def test_what_the_kernel_refuses_keeps_nothing_else_out(kernel: Kernel) -> None:
    confinement = Confinement(kernel.claim(), kernel.proc)
    kernel.refused = {"cpuset.cpus"}
    with sleeping() as pid:
        kernel.enter(pid, f"{SERVICE}/daemon")
        confinement.confine("chat", pid, BOUNDS)
        assert kernel.members(f"{SERVICE}/chat-{pid}") == [pid]
        assert kernel.read(f"{SERVICE}/chat-{pid}", "cpu.max") == "150000 100000"
        assert os.sched_getaffinity(pid) == {CORES[0]}
        missing, refusal = confinement.repair()[pid]
        assert missing.text == f"cpuset.cpus is missing, not {CORES[0]}"
        assert refusal.text.startswith("cannot be put right: [Errno 22] refused")


def test_without_cgroup_v2_nothing_is_claimed(tmp_path: Path) -> None:
    with pytest.raises(ConfinementError, match="no cgroup v2"):
        Tree.claim(tmp_path)


def test_a_cgroup_with_other_processes_in_it_is_not_ours(kernel: Kernel) -> None:
    with sleeping() as pid:
        kernel.enter(pid, SERVICE)
        with pytest.raises(ConfinementError, match="1 other processes"):
            kernel.claim()
    assert os.getpid() in kernel.members(SERVICE)
    assert not (kernel.mount / SERVICE / "daemon").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cgroup_that_cannot_be_written_is_not_ours(kernel: Kernel) -> None:
    (kernel.mount / SERVICE / "cgroup.procs").chmod(0o444)
    with pytest.raises(ConfinementError, match="not delegated"):
        kernel.claim()


def test_what_the_kernel_refuses_leaves_the_daemon_where_it_was(kernel: Kernel) -> None:
    (kernel.mount / SERVICE / "cgroup.subtree_control").write_text("cpu")  # somebody else's groups are below
    with pytest.raises(ConfinementError, match="cannot be used"):
        Tree.claim(kernel.mount, kernel.proc, _refuse)
    assert os.getpid() in kernel.members(SERVICE)


def _refuse(file: Path, _text: str) -> None:
    raise OSError(errno.EACCES, "refused", str(file))


# --- a worker --------------------------------------------------------------------------------------


def test_a_worker_gets_a_cgroup_of_its_own_with_all_that_was_decided(kernel: Kernel, worker: Worker) -> None:
    _, pid, group = worker
    assert kernel.members(group) == [pid]
    assert {file: kernel.read(group, file) for file in limits_of(BOUNDS)} == {
        "cpuset.cpus": str(CORES[0]),
        "cpu.max": "150000 100000",
        "cpu.weight": "500",
        "memory.high": str(64 << 20),
        "memory.max": str(128 << 20),
        "memory.oom.group": "1",
        "pids.max": "99",
    }
    assert os.sched_getaffinity(pid) == {CORES[0]}


def test_of_every_file_that_is_written_it_is_known_whether_the_kernel_has_it() -> None:
    assert set(FILES) == limits_of(BOUNDS).keys()


def test_what_is_not_limited_says_max(kernel: Kernel) -> None:
    free = Bounds(cores=(0, 1, 2, 5), threads=1, weight=100, nice=0)
    assert limits_of(free)["cpuset.cpus"] == "0-2,5"
    assert [limits_of(free)[file] for file in ("cpu.max", "memory.max", "pids.max")] == ["max 100000", "max", "max"]


def test_a_quota_is_never_less_than_the_kernel_takes() -> None:
    tiny = Bounds(cores=(0,), threads=1, weight=1, nice=0, quota_cores=0.0001)
    assert limits_of(tiny)["cpu.max"] == "1000 100000"


def test_limits_without_a_controller_are_left_out(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, ("cpuset", "pids"))
    with sleeping() as pid:
        confinement = Confinement(kernel.claim(), kernel.proc)
        kernel.enter(pid, f"{SERVICE}/daemon")
        confinement.confine("embed", pid, BOUNDS)
        group = kernel.mount / SERVICE / f"embed-{pid}"
        assert {file.name for file in group.iterdir()} == {"cpuset.cpus", "pids.max", "cgroup.procs"}
        assert confinement.repair() == {}


def test_what_is_as_decided_has_not_drifted(kernel: Kernel, worker: Worker) -> None:
    assert worker.confinement.repair() == {}


# --- drift -----------------------------------------------------------------------------------------


@needs_two_cores
def test_an_affinity_changed_from_outside_is_noticed_and_put_back(kernel: Kernel, worker: Worker) -> None:
    confinement, pid, _ = worker
    subprocess.run(["taskset", "-a", "-p", "-c", str(CORES[1]), str(pid)], check=True, capture_output=True)
    expected = f"1 threads may run on cores {CORES[1]}, not on cores {CORES[0]}"
    assert confinement.repair() == {pid: [Drift("affinity", expected)]}
    assert os.sched_getaffinity(pid) == {CORES[0]}
    assert confinement.repair() == {}


def test_a_worker_moved_to_another_cgroup_is_noticed_and_put_back(kernel: Kernel, worker: Worker) -> None:
    confinement, pid, group = worker
    kernel.write(kernel.mount / SERVICE / "daemon" / "cgroup.procs", str(pid))
    expected = f"it is in the cgroup /{SERVICE}/daemon, not in /{group}"
    assert confinement.repair() == {pid: [Drift("group", expected)]}
    assert kernel.members(group) == [pid]


def test_limits_changed_from_outside_are_noticed_and_put_back(kernel: Kernel, worker: Worker) -> None:
    confinement, pid, group = worker
    kernel.write(kernel.mount / group / "cpu.weight", "1")
    assert confinement.repair() == {pid: [Drift("limits", "cpu.weight is 1, not 500")]}
    assert kernel.read(group, "cpu.weight") == "500"


def test_a_quota_that_stops_a_worker_is_noticed_wherever_it_is_set(kernel: Kernel, worker: Worker) -> None:
    confinement, pid, group = worker
    (kernel.mount / group / "cpu.stat").write_text("usage_usec 5\nnr_periods 10\nnr_throttled 1\n")
    assert confinement.repair() == {}
    (kernel.mount / "edged.slice" / "cpu.stat").write_text("nr_throttled 8\n")
    (kernel.mount / "edged.slice" / "cpu.max").write_text("50000 100000\n")  # CPUQuota=50%, while it runs
    [drift] = confinement.repair()[pid]
    assert (drift.kind, drift.text) == ("stopped", "a CPU quota stopped it in 8 periods since the last look")
    assert confinement.repair() == {}


def test_a_quota_that_was_there_at_the_start_is_part_of_the_plan(kernel: Kernel) -> None:
    (kernel.mount / "edged.slice" / "cpu.max").write_text("150000 100000\n")
    confinement = Confinement(kernel.claim(), kernel.proc)
    with sleeping() as pid:
        kernel.enter(pid, f"{SERVICE}/daemon")
        confinement.confine("embed", pid, BOUNDS)
        assert confinement.repair() == {}
        (kernel.mount / "edged.slice" / "cpu.stat").write_text("nr_throttled 8\n")
        assert confinement.repair() == {}
        (kernel.mount / "edged.slice" / "cpu.max").write_text("max 100000\n")  # what it stopped before is not news
        assert confinement.repair() == {}


@needs_two_cores
def test_on_other_cores_each_process_keeps_the_memory_that_it_was_given(kernel: Kernel, worker: Worker) -> None:
    confinement, _, group = worker
    small = msgspec.structs.replace(BOUNDS, cores=CORES[1:2], memory_high=1 << 20, memory_max=2 << 20)
    confinement.confine_anew(lambda _name: small)
    assert kernel.read(group, "cpuset.cpus") == str(CORES[1])
    assert kernel.read(group, "memory.max") == str(128 << 20)


def test_a_quota_below_one_core_stops_even_one_thread_and_that_is_no_drift() -> None:
    little = Bounds(cores=(0,), threads=1, weight=100, nice=0, quota_cores=0.35)
    found = Actual(cores={1: frozenset({0})}, stops=10)
    assert list(drifts(little, found, group="", limits={}, online=frozenset({0}), stops_before=0)) == []


ONE, OTHER, BOTH = frozenset({0}), frozenset({1}), frozenset({0, 1})


@pytest.mark.parametrize(
    ("threads", "is_drift"),
    [
        ([BOTH, BOTH], False),
        ([ONE, BOTH, OTHER], False),
        ([ONE, BOTH], True),
        ([ONE, ONE], True),
        ([ONE, OTHER, OTHER], True),
        ([ONE, frozenset({2})], True),
    ],
)
def test_threads_may_share_out_the_cores_among_them(threads: list[frozenset[int]], is_drift: bool) -> None:
    bounds = Bounds(cores=(0, 1), threads=2, weight=100, nice=0)
    found = Actual(cores=dict(enumerate(threads)))
    drifted = list(drifts(bounds, found, group="", limits={}, online=frozenset({0, 1, 2}), stops_before=0))
    assert [each.kind for each in drifted] == ["affinity"] * is_drift


def test_a_core_that_was_switched_off_is_not_missed() -> None:
    bounds = Bounds(cores=(2, 3), threads=2, weight=100, nice=0)
    found = Actual(cores={1: frozenset({2})})
    assert list(drifts(bounds, found, group="", limits={}, online=frozenset({0, 1, 2}), stops_before=0)) == []


def test_a_process_all_of_whose_cores_are_switched_off_has_not_drifted() -> None:
    bounds = Bounds(cores=(2, 3), threads=2, weight=100, nice=0)
    found = Actual(cores={1: frozenset({0, 1})})
    assert list(drifts(bounds, found, group="", limits={}, online=frozenset({0, 1}), stops_before=0)) == []


def test_what_cannot_be_put_right_is_said_again_and_again(kernel: Kernel, worker: Worker) -> None:
    (kernel.mount / SERVICE / "cgroup.subtree_control").write_text("")  # somebody took the controllers away
    for file in limits_of(BOUNDS):
        (kernel.mount / worker.group / file).unlink()
    for _ in range(2):
        drifted = worker.confinement.repair()[worker.pid]
        assert {drift.text.partition(" is ")[0] for drift in drifted[:-1]} == set(limits_of(BOUNDS))
        assert drifted[-1].text.startswith("cannot be put right")


# --- the end ---------------------------------------------------------------------------------------


def test_the_cgroup_of_a_worker_that_ended_is_removed_and_it_is_told_whether_memory_was_why(kernel: Kernel) -> None:
    with sleeping() as pid:
        confinement = Confinement(kernel.claim(), kernel.proc)
        kernel.enter(pid, f"{SERVICE}/daemon")
        confinement.confine("chat", pid, BOUNDS)
        assert confinement.sweep() == {}
    group = kernel.mount / SERVICE / f"chat-{pid}"
    (group / "memory.events").write_text("low 0\nhigh 12\nmax 3\noom 1\noom_kill 2\n")
    assert confinement.sweep() == {}  # the kernel still holds it
    assert confinement.repair() == {}
    kernel.end(f"{SERVICE}/chat-{pid}")
    confinement.sweep()
    assert not group.exists()


def test_cgroups_left_by_an_earlier_daemon_are_removed(kernel: Kernel) -> None:
    (kernel.mount / SERVICE / "chat-4711").mkdir()
    (kernel.mount / SERVICE / ".control").mkdir()
    Confinement(kernel.claim(), kernel.proc).sweep()
    assert sorted(folder.name for folder in (kernel.mount / SERVICE).iterdir() if folder.is_dir()) == [
        ".control",
        "daemon",
    ]


def test_in_the_end_the_daemon_is_where_it_was(kernel: Kernel) -> None:
    before = os.sched_getaffinity(0)
    confinement = Confinement(kernel.claim(), kernel.proc)
    confinement.confine("daemon", os.getpid(), BOUNDS)
    assert os.sched_getaffinity(0) == {CORES[0]}
    confinement.release(frozenset(before))
    assert os.sched_getaffinity(0) == before
    assert kernel.members(SERVICE) == [os.getpid()]
    assert kernel.read(SERVICE, "cgroup.subtree_control") == ""


# --- without cgroups -------------------------------------------------------------------------------


@needs_two_cores
def test_without_cgroups_affinity_and_nice_hold_a_worker() -> None:
    nicer = Bounds(cores=CORES[:1], threads=1, weight=100, nice=5)
    with sleeping() as pid:
        confinement = Confinement(None)
        confinement.confine("embed", pid, nicer)
        assert os.sched_getaffinity(pid) == {CORES[0]}
        assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
        os.sched_setaffinity(pid, CORES)
        assert [drift.kind for drift in confinement.repair()[pid]] == ["affinity"]
        assert os.sched_getaffinity(pid) == {CORES[0]}
    assert (confinement.repair(), confinement.sweep()) == ({}, {})


def test_a_worker_may_begin_while_others_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    confinement, is_ours = Confinement(None), Confinement._is_ours
    with sleeping() as first, sleeping() as second:
        confinement.confine("chat", first, BOUNDS)

        def meanwhile(self: Confinement, pid: int) -> bool:
            confinement.confine("embed", second, BOUNDS)
            return is_ours(self, pid)

        monkeypatch.setattr(Confinement, "_is_ours", meanwhile)
        assert confinement.sweep() == {}
        assert confinement.repair() == {}


def test_a_process_that_is_gone_needs_no_place() -> None:
    with sleeping() as pid:
        pass
    confinement = Confinement(None)
    confinement.confine("chat", pid, BOUNDS)
    assert confinement.repair() == {}


def test_a_process_that_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").symlink_to("/proc/1/stat")
    confinement = Confinement(None, tmp_path)
    confinement.confine("chat", 1, BOUNDS)  # what ended had this number
    assert confinement.repair() == {}
