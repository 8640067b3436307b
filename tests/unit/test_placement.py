"""From the cores and the quota of a device to what each process gets."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.hardware import detect
from edged.hardware.cores import Core, read_cores
from edged.hardware.placement import Machine, Strain, Wishes, place
from tests import sysfs

Board = tuple[str, list[sysfs.CpuFiles]]


@pytest.mark.parametrize(
    ("cores", "quota", "chat", "embed"),
    [
        (1, None, 1, 1),
        (2, None, 2, 1),
        (4, None, 3, 1),
        (8, 2.0, 2, 1),
        (8, 2.4, 2, 1),
        (8, 2.5, 3, 1),
        (8, 3.5, 4, 2),
        (2, 0.35, 1, 1),
        (2, 1.49, 1, 1),
        (2, 1.5, 2, 1),
        (4, 16.0, 3, 1),
    ],
)
def test_no_more_threads_than_cores_or_than_a_quota_sustains(
    cores: int, quota: float | None, chat: int, embed: int
) -> None:
    placement = place(Machine.of(cores, quota))
    assert (placement.chat_threads, placement.embed_threads) == (chat, embed)


@pytest.mark.parametrize(
    ("board", "chat", "threads", "rest"),
    [
        (sysfs.PI4, (0, 1, 2), 3, (3,)),
        (sysfs.PI5, (0, 1, 2), 3, (3,)),
        (sysfs.RK3588, (4, 5, 6, 7), 4, (0, 1, 2, 3)),
        (sysfs.RK3399, (4, 5), 2, (0, 1, 2, 3)),
        (sysfs.ORIN_NX_15W, (0, 1, 2), 3, (3,)),
        (sysfs.X86_4C8T, (0, 1, 2, 3, 4, 5), 4, (6, 7)),
        (sysfs.VM, (0, 1), 2, (0, 1)),
    ],
)
def test_the_chat_worker_gets_the_fastest_cores_and_the_others_the_rest(
    board: Board, chat: tuple[int, ...], threads: int, rest: tuple[int, ...], tmp_path: Path
) -> None:
    placement = place(Machine(cores=read_cores(sysfs.write_cpus(tmp_path, *board))))
    assert (placement.chat.cores, placement.chat.threads) == (chat, threads)
    assert placement.embed.cores == placement.daemon.cores == rest


P, E = 1.0, 0.75


def hybrid(*speeds: float) -> Machine:
    """A PC's processor: of each core of speed 1 two threads, numbered one after the other as Linux does."""
    cores: list[Core] = []
    for speed in speeds:
        numbers = range(len(cores), len(cores) + (2 if speed == P else 1))
        cores += [Core(number, speed, frozenset(numbers)) for number in numbers]
    return Machine(cores=tuple(cores))


def test_many_cores_that_are_not_much_slower_compute_beside_the_few_fastest() -> None:
    chat = place(hybrid(P, P, *[E] * 8)).chat
    assert (chat.threads, set(range(4, 11)) < set(chat.cores)) == (9, True)
    phone = Machine(cores=tuple(Core(n, s, frozenset({n})) for n, s in enumerate([0.3] * 3 + [0.79] * 4 + [1.0])))
    assert place(phone).chat.cores == (3, 4, 5, 6, 7)


def test_slower_cores_that_add_little_are_left_to_the_others() -> None:
    few = place(hybrid(*[P] * 8, *[E] * 4))
    assert (few.chat.threads, set(few.embed.cores)) == (8, {16, 17, 18, 19})


def test_where_all_share_the_cores_weights_decide() -> None:
    placement = place(Machine.of(2))
    assert placement.chat.cores == placement.embed.cores == placement.daemon.cores
    assert placement.embed.weight < placement.chat.weight < placement.daemon.weight


def test_a_share_of_the_machine_is_a_quota_and_fewer_threads() -> None:
    placement = place(Machine.of(4), Wishes(share=0.5))
    assert (placement.chat.quota_cores, placement.chat.threads) == (2.0, 2)
    assert place(Machine.of(4, quota_cores=1.0), Wishes(share=0.5)).chat.quota_cores == 1.0
    assert place(Machine.of(4)).chat.quota_cores is None


def test_configured_threads_are_taken_as_they_are_and_get_as_many_cores_as_there_are() -> None:
    placement = place(Machine.of(2, 0.5), Wishes(chat_threads=4, embed_threads=3))
    assert (placement.chat_threads, placement.embed_threads) == (4, 3)
    assert place(Machine.of(4), Wishes(chat_threads=4)).chat.cores == (0, 1, 2, 3)
    assert place(Machine.of(8), Wishes(chat_threads=2)).embed_threads == 1


def test_reserved_cores_are_as_many_as_there_are_threads_and_nobody_elses() -> None:
    placement = place(Machine.of(8), Wishes(reserve_cores=True, chat_threads=3))
    assert placement.reserved == placement.chat.cores == (0, 1, 2)
    assert placement.daemon.cores == (3, 4, 5, 6, 7)
    two = place(Machine.of(2, quota_cores=1.0), Wishes(reserve_cores=True))
    assert (two.reserved, two.daemon.cores) == ((0,), (1,))


def test_one_core_is_left_to_others_unless_the_threads_are_given_and_need_all() -> None:
    two = place(Machine.of(2), Wishes(reserve_cores=True))
    assert (two.chat.threads, two.reserved, two.daemon.cores) == (1, (0,), (1,))
    assert place(Machine.of(2), Wishes(reserve_cores=True, chat_threads=2)).reserved == ()
    assert place(Machine.of(1), Wishes(reserve_cores=True)).reserved == ()


def test_beside_a_neighbour_that_keeps_a_core_one_thread_fewer_computes() -> None:
    assert place(Machine.of(4), strain=Strain(crowded=True)).chat.threads == 2
    assert place(Machine.of(1), strain=Strain(crowded=True)).chat.threads == 1


def test_heat_leaves_a_share_of_the_threads_and_at_least_one() -> None:
    assert [place(Machine.of(8), strain=Strain(thread_share=s)).chat.threads for s in (1.0, 0.75, 0.5, 0.0)] == [
        6,
        4,
        3,
        1,
    ]


def test_a_worker_may_take_more_than_its_model_needs_and_less_than_all() -> None:
    needed = 362_000_000
    chat = place(Machine.of(2), chat_bytes=needed).chat
    assert chat.memory_high is not None
    assert chat.memory_max is not None
    assert needed * 1.05 < chat.memory_high < chat.memory_max < 2 * needed
    assert chat.memory_high % 65_536 == chat.memory_max % 65_536 == 0
    assert place(Machine.of(2)).chat.memory_max is None


speeds = st.sampled_from([0.3, 0.5, 0.79, 0.8, 0.9, 1.0])
quotas = st.none() | st.floats(0.01, 64)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    found = draw(st.lists(speeds, min_size=1, max_size=16))
    pairs = draw(st.booleans()) and len(found) > 1
    cores = tuple(Core(n, s, frozenset({n, n ^ 1}) if pairs else frozenset({n})) for n, s in enumerate(found))
    return Machine(cores=cores, quota_cores=draw(quotas), memory_bytes=draw(st.none() | st.just(1 << 32)))


@given(machines(), st.floats(0.01, 1), st.booleans(), st.booleans(), st.floats(0, 1))
def test_whatever_the_device_no_thread_is_without_a_core_or_its_quota(
    machine: Machine, share: float, reserve: bool, crowded: bool, thread_share: float
) -> None:
    wishes = Wishes(share=share, reserve_cores=reserve)
    placement = place(machine, wishes, strain=Strain(crowded=crowded, thread_share=thread_share))
    all_cores = {core.number for core in machine.cores}
    for bounds in (placement.chat, placement.embed, placement.daemon):
        assert bounds.cores
        assert set(bounds.cores) <= all_cores
    chat = placement.chat
    assert 1 <= chat.threads <= len(chat.cores)
    assert chat.threads <= max(1.0, (chat.quota_cores or len(all_cores)) + 0.5)
    assert placement.embed.threads <= len(placement.embed.cores)
    assert not set(placement.reserved) & set(placement.daemon.cores)
    unstrained = place(machine, wishes)
    assert chat.threads <= unstrained.chat.threads
    assert chat.cores == unstrained.chat.cores


# --- what the device says --------------------------------------------------------------------------


class Tree:
    """A cgroup file system under a temporary directory, and the membership file of a process in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cgroup"
        self.membership = folder / "membership"

    def belongs(self, *lines: str) -> None:
        self.membership.write_text("".join(f"{line}\n" for line in lines))

    def v2(self, group: str, limit: str) -> None:
        self._write(self.root / group / "cpu.max", limit)

    def v1(self, group: str, quota: int, period: int = 100_000, mount: str = "cpu") -> None:
        self._write(self.root / mount / group / "cpu.cfs_quota_us", str(quota))
        self._write(self.root / mount / group / "cpu.cfs_period_us", str(period))

    def quota(self) -> float | None:
        return detect.machine(self.root, self.membership).quota_cores

    @staticmethod
    def _write(file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_the_quota_of_cgroup_v2_is_quota_over_period(tree: Tree) -> None:
    tree.belongs("0::/system.slice/edged.service")
    tree.v2("system.slice/edged.service", "150000 100000")
    assert tree.quota() == 1.5


def test_the_tightest_limit_on_the_way_to_the_root_counts(tree: Tree) -> None:
    tree.belongs("0::/a/b/c")
    tree.v2("a/b/c", "max 100000")
    tree.v2("a/b", "200000 100000")
    tree.v2("a", "35000 100000")
    tree.v2("a/other", "1000 100000")
    assert tree.quota() == 0.35


def test_no_limit_anywhere_is_no_quota(tree: Tree) -> None:
    tree.belongs("0::/a")
    tree.v2("a", "max 100000")
    assert tree.quota() is None


def test_a_container_that_sees_only_its_own_group_at_the_root_finds_its_quota(tree: Tree) -> None:
    tree.belongs("0::/docker/0123")
    tree.v2("", "200000 100000")
    assert tree.quota() == 2.0


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_cgroup_v1_is_found_under_either_name_of_its_mount(tree: Tree, mount: str) -> None:
    tree.belongs("12:memory:/m", "4:cpu,cpuacct:/edged", "1:name=systemd:/s", "0::/u")
    tree.v1("edged", 70_000, mount=mount)
    assert tree.quota() == 0.7


def test_minus_one_in_cgroup_v1_is_no_limit(tree: Tree) -> None:
    tree.belongs("4:cpu:/a/b")
    tree.v1("a/b", -1)
    tree.v1("a", 100_000, period=50_000)
    assert tree.quota() == 2.0
    tree.v1("a", -1)
    assert tree.quota() is None


def test_cpuset_is_not_taken_for_cpu(tree: Tree) -> None:
    tree.belongs("3:cpuset:/edged")
    tree.v1("edged", 70_000)
    assert tree.quota() is None


def test_a_system_without_cgroups_has_no_quota(tree: Tree) -> None:
    assert tree.quota() is None


def test_a_group_whose_name_is_not_ascii_is_read_all_the_same(tree: Tree) -> None:
    tree.belongs("0::/gerät")
    tree.v2("gerät", "100000 100000")
    assert tree.quota() == 1.0


def test_cores_are_those_of_the_affinity_mask(tree: Tree) -> None:
    machine = detect.machine(tree.root, tree.membership)
    assert {core.number for core in machine.cores} == os.sched_getaffinity(0)


def test_cores_that_sysfs_says_nothing_of_count_as_equal(tree: Tree, tmp_path: Path) -> None:
    machine = detect.machine(tree.root, tree.membership, tmp_path / "none")
    assert {core.speed for core in machine.cores} == {1.0}
