"""When memory is short: batch work goes first, then budgets, and both come back in reverse."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.hardware.pressure import (
    CALM_OBSERVATIONS,
    MOVES,
    TIGHT_OBSERVATIONS,
    Pressure,
    Stage,
    Stall,
    Stalled,
    Supply,
    read_stalled,
    stall,
    supply,
)

RECORDED = """\
some avg10=1.53 avg60=0.87 avg300=0.23 total=2412345
full avg10=0.42 avg60=0.20 avg300=0.05 total=912345
"""


def test_the_kernels_totals_are_read(tmp_path: Path) -> None:
    (tmp_path / "memory.pressure").write_text(RECORDED)
    assert read_stalled(tmp_path / "memory.pressure") == Stalled(2_412_345, 912_345)


def test_a_kernel_that_does_not_measure_says_nothing(tmp_path: Path) -> None:
    assert read_stalled(tmp_path / "none") is None
    assert stall(None, Stalled(0, 0), 1.0) is None


def test_the_share_of_the_time_between_two_readings_counts() -> None:
    assert stall(Stalled(1_000_000, 0), Stalled(1_500_000, 50_000), 2.0) == Stall(0.25, 0.025)


@pytest.mark.parametrize(
    ("available", "some", "full", "found"),
    [
        (50, 0.0, 0.0, Supply.SHORT),
        (150, 0.0, 0.0, Supply.TIGHT),
        (500, 0.0, 0.0, Supply.PLENTY),
        (500, 0.2, 0.0, Supply.SHORT),
        (500, 0.05, 0.03, Supply.SHORT),
        (500, 0.05, 0.0, Supply.TIGHT),
        (None, 0.0, 0.0, Supply.PLENTY),
    ],
)
def test_memory_is_short_when_little_is_free_or_processes_wait_for_it(
    available: int | None, some: float, full: float, found: Supply
) -> None:
    assert supply(available=available, reserve=100, stall=Stall(some, full)) is found


def test_without_pressure_the_bytes_that_are_free_tell() -> None:
    assert supply(available=50, reserve=100, stall=None) is Supply.SHORT
    assert supply(available=None, reserve=100, stall=None) is Supply.PLENTY


def stages(*found: Supply) -> list[Stage]:
    pressure, seen = Pressure(), []
    for each in found:
        pressure = pressure.observe(each)
        seen.append(pressure.stage)
    return seen


def test_batch_work_goes_before_budgets_shrink() -> None:
    assert stages(Supply.SHORT, Supply.SHORT, Supply.SHORT) == [Stage.SHEDDING, Stage.SHRINKING, Stage.SHRINKING]


def test_what_was_given_up_comes_back_step_by_step_after_plenty_for_a_while() -> None:
    seen = stages(Supply.SHORT, Supply.SHORT, *[Supply.PLENTY] * 2 * CALM_OBSERVATIONS)
    assert seen.index(Stage.SHEDDING, 1) == 1 + CALM_OBSERVATIONS
    assert seen[-2:] == [Stage.SHEDDING, Stage.CALM]


def test_where_there_is_never_plenty_it_comes_back_when_memory_was_not_short_for_long() -> None:
    nearly = [Supply.TIGHT] * (TIGHT_OBSERVATIONS - 1)
    assert stages(Supply.SHORT, *nearly)[-1] is Stage.SHEDDING
    assert stages(Supply.SHORT, *nearly, Supply.TIGHT)[-1] is Stage.CALM
    assert stages(Supply.SHORT, *nearly, Supply.SHORT, *nearly)[-1] is Stage.SHRINKING


@given(st.lists(st.sampled_from(Supply), max_size=80))
def test_only_legal_moves_are_made(found: list[Supply]) -> None:
    seen = [Stage.CALM, *stages(*found)]
    for before, after in itertools.pairwise(seen):
        assert after is before or after in MOVES[before]


def test_stages_have_their_severity() -> None:
    assert [stage.severity for stage in Stage] == [0, 1, 2]
