"""A neighbour is noticed by the time our threads wait, and its leaving by the time their cores are idle."""

import os
from pathlib import Path

import pytest

from edged.hardware.neighbours import (
    CROWDED_OBSERVATIONS,
    FREE_OBSERVATIONS,
    Crowd,
    Neighbours,
    Scheduled,
    crowd,
    read_busy_seconds,
    read_scheduled,
)
from tests.sysfs import write

SECOND = 10**9
CROWDED = Crowd(run_seconds=1.5, wait_share=0.3, foreign_cores=0.9)
ALONE = Crowd(run_seconds=1.5, wait_share=0.01, foreign_cores=0.1)


def after(*found: Crowd | None, start: Neighbours | None = None) -> Neighbours:
    neighbours = start or Neighbours()
    for each in found:
        neighbours = neighbours.observe(each)
    return neighbours


def test_a_core_is_kept_once_threads_have_waited_for_it_several_times_in_a_row() -> None:
    assert not after(*[CROWDED] * (CROWDED_OBSERVATIONS - 1)).crowded
    assert after(*[CROWDED] * CROWDED_OBSERVATIONS).crowded
    almost = [CROWDED] * (CROWDED_OBSERVATIONS - 1)
    assert not after(*almost, ALONE, *almost).crowded


def test_waits_that_were_counted_need_no_second_look_and_the_neighbour_leaves_as_any_other() -> None:
    crowded = Neighbours().observe(None, starved=True)
    assert crowded.crowded
    assert not after(*[ALONE] * FREE_OBSERVATIONS, start=crowded).crowded


def test_threads_that_wait_for_each_other_do_not_make_a_neighbour() -> None:
    own = Crowd(run_seconds=1.9, wait_share=0.4, foreign_cores=0.1)
    assert not after(*[own] * 10).crowded


def test_a_neighbour_that_is_outweighed_does_not_count() -> None:
    outweighed = Crowd(run_seconds=1.9, wait_share=0.02, foreign_cores=0.6)
    assert not after(*[outweighed] * 10).crowded


def test_an_idle_worker_says_nothing_of_neighbours() -> None:
    idle = Crowd(run_seconds=0.01, wait_share=0.9, foreign_cores=1.0)
    assert not after(*[idle] * 10, None).crowded


def test_a_neighbour_has_left_once_its_core_is_idle_for_a_while() -> None:
    crowded = Neighbours(crowded=True)
    stays = Crowd(run_seconds=0.9, wait_share=0.0, foreign_cores=0.9)  # nobody waits: there is a thread fewer
    assert after(*[stays] * 50, start=crowded).crowded
    assert after(*[ALONE] * (FREE_OBSERVATIONS - 1), start=crowded).crowded
    assert not after(*[ALONE] * FREE_OBSERVATIONS, start=crowded).crowded


def test_what_lies_between_two_readings_counts() -> None:
    found = crowd(
        Scheduled(10 * SECOND, SECOND),
        Scheduled(13 * SECOND, 2 * SECOND),
        busy_seconds=3.5,
        own_seconds=3.0,
        seconds=2.0,
    )
    assert found == Crowd(run_seconds=3.0, wait_share=0.25, foreign_cores=0.25)


def test_the_time_for_which_a_quota_stops_the_worker_is_not_taken_by_a_neighbour() -> None:
    before, after = (
        Scheduled(),
        Scheduled(1_400_000_000, 600_000_000),
    )  # two threads under 1.5 cores, 0.1 s for the daemon

    def found(own_seconds: float, quota_cores: float | None) -> Crowd | None:
        return crowd(before, after, busy_seconds=2.0, own_seconds=own_seconds, seconds=1.0, quota_cores=quota_cores)

    assert found(1.5, 1.5) == Crowd(run_seconds=1.4, wait_share=0.0, foreign_cores=0.5)
    unlimited, kept_from_it = found(1.5, None), found(1.4, 1.9)
    assert unlimited is not None
    assert kept_from_it is not None
    assert unlimited.wait_share == pytest.approx(0.3)
    assert kept_from_it.wait_share == pytest.approx(0.5 / 1.9)


def test_readings_of_two_processes_cannot_be_compared() -> None:
    before, new = Scheduled(10 * SECOND, SECOND), Scheduled(SECOND, 0)
    assert crowd(before, new, busy_seconds=1.0, own_seconds=0.0, seconds=1.0) is None


def test_the_times_of_all_threads_are_added_up(tmp_path: Path) -> None:
    write(tmp_path, {"7/task/7/schedstat": "100 20 3", "7/task/8/schedstat": "50 5 1", "7/task/9/schedstat": "garbage"})
    assert read_scheduled(7, tmp_path) == Scheduled(150, 25)
    assert read_scheduled(8, tmp_path) == Scheduled(0, 0)


def test_the_busy_time_of_some_cores_leaves_idling_waiting_and_other_guests_out(tmp_path: Path) -> None:
    lines = ["cpu  9 9 9 9 9 9 9 9 9 9", "cpu0 100 20 30 5000 700 4 6 80 9 9", "cpu1 200 0 0 0 0 0 0 0 0 0", "intr 5"]
    write(tmp_path, {"stat": "\n".join(lines)})
    ticks = os.sysconf("SC_CLK_TCK")
    assert read_busy_seconds([0], tmp_path) == 160 / ticks
    assert read_busy_seconds([0, 1], tmp_path) == 360 / ticks
    assert read_busy_seconds([0], tmp_path / "none") == 0.0


def test_this_process_and_this_machine_can_be_read() -> None:
    assert read_scheduled(os.getpid()).run > 0
    assert read_busy_seconds(os.sched_getaffinity(0)) > 0
