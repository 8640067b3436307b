"""Windows of time, in bounded memory."""

import msgspec
import pytest

from edged.probe.profile import Device, Profile, Warmth, merge, profile
from edged.probe.rollup import MINUTES, WINDOWS, Rollups
from tests.samples import NOW, process, sample

DEVICE = Device(id="pi", software="1", cores={0: 1.0})


def second(number: int) -> Profile:
    return profile(sample(process(minor_faults=number), at=NOW + number), DEVICE, {}, Warmth())


def faults(found: Profile | None) -> int:
    assert found is not None
    figure = found.workers["chat"].minor_faults
    assert figure is not None
    return figure.value


def rolled(seconds: int) -> Rollups:
    rollups = Rollups()
    for number in range(seconds):
        rollups.add(second(number))
    return rollups


def test_before_the_first_second_there_is_no_window() -> None:
    assert [Rollups().window(window) for window in WINDOWS] == [None] * 4


@pytest.mark.parametrize("seconds", [1, 9, 10, 11, 59, 60, 61, 99, 130])
def test_a_window_is_the_merge_of_its_seconds(seconds: int) -> None:
    rollups = rolled(seconds)
    for window, whole in (("1s", 1), ("10s", 10), ("1m", 60)):
        found = rollups.window(window)  # type: ignore[arg-type]
        assert found is not None
        length = round(found.seconds)
        assert min(seconds, whole) <= length <= whole + 9
        assert faults(found) == sum(range(seconds - length, seconds))
        assert msgspec.structs.replace(found, probe=second(0).probe, seconds=0.0) == msgspec.structs.replace(
            merge([second(number) for number in range(seconds - length, seconds)]), probe=second(0).probe, seconds=0.0
        )


def test_a_quarter_of_an_hour_is_kept_and_no_more() -> None:
    found = rolled(1500).window("15m")
    assert found is not None
    assert MINUTES * 60 <= found.seconds < (MINUTES + 1) * 60
    assert found.at == NOW + 1499
    assert found.since == found.at - found.seconds
    first = round(found.since - NOW) + 1
    assert faults(found) == sum(range(first, 1500))


def test_memory_is_bounded() -> None:
    rollups = rolled(3600)
    kept = [*rollups._seconds, *rollups._tens, *rollups._minutes, *rollups._loose_seconds, *rollups._loose_tens]
    assert len(kept) <= 10 + 6 + 15 + 9 + 5
