"""Work is taken back before the device is slowed, and given back without going to and fro."""

import itertools
import math
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from edged.hardware.governor import CALM_SECONDS, STEPS, Governor, Reading

MARGIN = 5.0
SLOWS_AT = 80.0

# Raspberry Pi 3B without heat sink under 7-zip on four cores, °C about every 33 s, from sbc-bench's documentation; the
# firmware slowed it from the eighth reading on.
PI_3B = (61.2, 68.8, 72.0, 73.1, 75.2, 78.4, 77.9, 81.1, 81.7, 76.3)
PI_3B_SECONDS = 33.0
# Raspberry Pi 4 at 2 GHz with a fan, the same load.
PI_4_COOLED = (48.7, 52.1, 53.1, 52.6, 52.1, 52.6, 52.1)


def observe(governor: Governor, celsius: float, now: float, **signs: bool) -> Governor:
    reading = Reading(below_celsius=SLOWS_AT - celsius, **signs)
    return governor.observe(reading, margin_celsius=MARGIN, now=now)


def replay(trace: Iterable[float], seconds: float) -> list[int]:
    """The step after each reading; observed every second, as the temperature goes from one to the next."""
    governor, levels = Governor(), []
    readings = list(trace)
    for index, (before, after) in enumerate(itertools.pairwise(readings)):
        for second in range(int(seconds)):
            celsius = before + (after - before) * second / seconds
            governor = observe(governor, celsius, index * seconds + second)
        levels.append(governor.level)
    return levels


def test_on_a_recorded_trace_work_is_taken_back_before_the_firmware_slowed_the_cpu() -> None:
    levels = replay(PI_3B, PI_3B_SECONDS)
    assert levels[2] == 0  # 73 °C
    assert levels[4] >= 2  # 78 °C
    assert levels == sorted(levels)


def test_a_cooled_device_works_at_full() -> None:
    assert set(replay(PI_4_COOLED, 30)) == {0}


def simulate(*, idle: float, full: float, minutes: int, threads: int = 4) -> tuple[list[float], list[int]]:
    """A device that takes 45 s to warm up, and works as much as it may: its temperature and its step, each second."""
    celsius, governor = idle, Governor()
    temperatures, levels = [], []
    for now in range(minutes * 60):
        step = governor.step
        work = max(1, math.floor(threads * step.threads)) / threads
        celsius += (idle + (full - idle) * work - celsius) / 45
        governor = observe(governor, round(celsius, 1), float(now))
        temperatures.append(celsius)
        levels.append(governor.level)
    return temperatures, levels


def test_a_device_that_would_get_too_hot_settles_below_the_point_of_being_slowed() -> None:
    temperatures, levels = simulate(idle=45, full=95, minutes=60)
    assert max(temperatures) < SLOWS_AT
    moves = sum(before != after for before, after in itertools.pairwise(levels))
    assert moves <= 60  # at most one a minute
    assert max(levels) < len(STEPS) - 1


def test_a_device_that_stays_cool_enough_is_left_alone() -> None:
    assert set(simulate(idle=40, full=74, minutes=20)[1]) == {0}


def test_a_device_slowed_already_goes_down_fast_and_no_further_than_the_last_step() -> None:
    governor = Governor()
    for now in range(20):
        governor = observe(governor, 60.0, float(now), slowed=True)
    assert governor.level == len(STEPS) - 1
    assert governor.step.threads == 0.0


def test_under_voltage_takes_work_back_on_a_cool_device() -> None:
    assert observe(Governor(), 40.0, 0.0, under_voltage=True).level == 1


def test_work_comes_back_one_step_after_each_calm_half_minute() -> None:
    governor = Governor(level=2, moved_at=0.0)
    levels = []
    for now in range(100):
        governor = observe(governor, 60.0, float(now))
        levels.append(governor.level)
    assert levels.index(1) == CALM_SECONDS
    assert levels.index(0) == 2 * CALM_SECONDS + 1


def test_between_the_margin_and_calm_nothing_changes() -> None:
    governor = Governor(level=2, moved_at=0.0)
    for now in range(1000):
        governor = observe(governor, 72.0, float(now))
    assert governor.level == 2


def test_a_device_without_sensors_is_judged_by_what_else_is_known() -> None:
    blind = Reading(below_celsius=None)
    assert Governor().observe(blind, margin_celsius=MARGIN, now=0.0).level == 0
    slowed = Reading(below_celsius=None, slowed=True)
    governor = Governor().observe(slowed, margin_celsius=MARGIN, now=0.0)
    assert governor.level == 1
    for now in range(1, 40):
        governor = governor.observe(blind, margin_celsius=MARGIN, now=float(now))
    assert governor.level == 0


@given(st.lists(st.tuples(st.floats(-20, 120), st.booleans(), st.booleans()), max_size=200))
def test_steps_are_never_skipped(readings: list[tuple[float, bool, bool]]) -> None:
    governor = Governor()
    for now, (celsius, slowed, under_voltage) in enumerate(readings):
        after = observe(governor, celsius, float(now), slowed=slowed, under_voltage=under_voltage)
        assert abs(after.level - governor.level) <= 1
        assert 0 <= after.level < len(STEPS)
        governor = after


def test_each_step_leaves_no_more_than_the_one_before() -> None:
    for before, after in itertools.pairwise(STEPS):
        assert after.threads <= before.threads
        assert after.sequences <= before.sequences
        assert (after.answer_factor or 99) <= (before.answer_factor or 99)
        assert after != before
