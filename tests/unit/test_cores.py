"""What sysfs says of the cores of several boards, and the kernel's lists of numbers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.hardware.cores import format_list, parse_list, read_cores, read_online
from tests import sysfs

Board = tuple[str, list[sysfs.CpuFiles]]


def numbers_and_speeds(board: Board, root: Path) -> list[tuple[int, float]]:
    return [(core.number, round(core.speed, 2)) for core in read_cores(sysfs.write_cpus(root, *board))]


@pytest.mark.parametrize("board", [sysfs.PI4, sysfs.PI5, sysfs.N150, sysfs.VM])
def test_cores_of_one_kind_are_equal(board: Board, tmp_path: Path) -> None:
    assert numbers_and_speeds(board, tmp_path) == [(number, 1.0) for number in range(len(board[1]))]


def test_the_little_cores_of_an_rk3588_have_two_fifths_of_the_big_ones_capacity(tmp_path: Path) -> None:
    speeds = [speed for _, speed in numbers_and_speeds(sysfs.RK3588, tmp_path)]
    assert speeds == [0.4, 0.4, 0.4, 0.4, 0.98, 0.98, 1.0, 1.0]


def test_without_capacities_the_highest_frequency_tells(tmp_path: Path) -> None:
    speeds = [speed for _, speed in numbers_and_speeds(sysfs.RK3399, tmp_path)]
    assert speeds == [0.79, 0.79, 0.79, 0.79, 1.0, 1.0]


def test_cores_that_are_off_are_left_out(tmp_path: Path) -> None:
    assert [number for number, _ in numbers_and_speeds(sysfs.ORIN_NX_15W, tmp_path)] == [0, 1, 2, 3]


def test_a_capacity_that_not_every_core_has_is_no_measure(tmp_path: Path) -> None:
    board = ("0-1", [sysfs.CpuFiles(1000, 512, "0"), sysfs.CpuFiles(1000, None, "1")])
    assert numbers_and_speeds(board, tmp_path) == [(0, 1.0), (1, 1.0)]


def test_threads_of_one_physical_core_know_each_other(tmp_path: Path) -> None:
    cores = read_cores(sysfs.write_cpus(tmp_path, *sysfs.X86_4C8T))
    assert [sorted(core.siblings) for core in cores[:5]] == [[0, 4], [1, 5], [2, 6], [3, 7], [0, 4]]


def test_without_sysfs_no_core_is_known(tmp_path: Path) -> None:
    assert (read_cores(tmp_path / "none"), read_online(tmp_path / "none")) == ((), frozenset())


def test_this_machine_has_cores() -> None:
    assert {core.number for core in read_cores()} == read_online() != frozenset()


@pytest.mark.parametrize(
    ("text", "numbers"), [("", []), ("\n", []), ("0", [0]), ("0-3\n", [0, 1, 2, 3]), ("0,2-3,7", [0, 2, 3, 7])]
)
def test_the_kernels_lists_are_read(text: str, numbers: list[int]) -> None:
    assert sorted(parse_list(text)) == numbers


@given(st.frozensets(st.integers(0, 300)))
def test_a_list_that_was_written_reads_the_same(numbers: frozenset[int]) -> None:
    assert parse_list(format_list(numbers)) == numbers
