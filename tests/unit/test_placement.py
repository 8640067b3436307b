"""From the cores and the quota of a device to the threads of its workers."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.hardware import detect
from edged.hardware.detect import Cpu
from edged.hardware.placement import Placement, place


@pytest.mark.parametrize(
    ("cores", "quota", "chat", "embed"),
    [
        (1, None, 1, 1),
        (2, None, 2, 1),
        (4, None, 4, 2),
        (8, 2.0, 2, 1),
        (8, 2.9, 2, 1),
        (2, 0.35, 1, 1),
        (2, 1.99, 1, 1),
        (4, 16.0, 4, 2),
    ],
)
def test_no_more_threads_than_cores_or_whole_cores_of_quota(
    cores: int, quota: float | None, chat: int, embed: int
) -> None:
    assert place(Cpu(cores, quota)) == Placement(chat, embed)


@given(st.integers(1, 512), st.none() | st.floats(0.01, 1024))
def test_a_thread_is_never_without_a_core_or_its_quota(cores: int, quota: float | None) -> None:
    placement = place(Cpu(cores, quota))
    allowed = max(1.0, min(cores, cores if quota is None else quota))
    assert 1 <= placement.embed_threads <= placement.chat_threads <= allowed


def test_configured_threads_are_taken_as_they_are() -> None:
    assert place(Cpu(2, 0.5), chat_threads=4, embed_threads=3) == Placement(4, 3)
    assert place(Cpu(8, None), chat_threads=2) == Placement(2, 1)


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
        return detect.cpu(self.root, self.membership).quota_cores

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
    assert detect.cpu(tree.root, tree.membership).cores == len(os.sched_getaffinity(0))
