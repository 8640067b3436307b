"""Pauses between attempts."""

from hypothesis import given
from hypothesis import strategies as st

from edged.runtime.backoff import pause_seconds

failures = st.integers(1, 10**9)
random = st.floats(0, 1, exclude_max=True)


@given(failures, random)
def test_a_pause_is_never_shorter_than_half_the_smallest_nor_longer_than_the_largest(count: int, chance: float) -> None:
    assert 0.05 <= pause_seconds(count, smallest=0.1, largest=30.0, random=chance) <= 30.0


@given(failures, random)
def test_more_failures_never_make_the_same_chance_a_shorter_pause(count: int, chance: float) -> None:
    sooner = pause_seconds(count, smallest=0.1, largest=30.0, random=chance)
    assert sooner <= pause_seconds(count + 1, smallest=0.1, largest=30.0, random=chance)


def test_the_longest_pause_doubles_until_the_largest() -> None:
    pauses = [pause_seconds(count, smallest=1.0, largest=10.0, random=1.0) for count in (1, 2, 3, 4, 5, 6)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_chance_spreads_the_pauses_over_the_whole_range() -> None:
    assert pause_seconds(5, smallest=1.0, largest=10.0, random=0.0) == 0.5
    assert pause_seconds(5, smallest=1.0, largest=10.0, random=0.5) == 5.25
