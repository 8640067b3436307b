"""Fast down when memory is short, slowly up when there is plenty; of all limits the smallest holds."""

from hypothesis import given
from hypothesis import strategies as st

from edged.hardware.governor import STEPS
from edged.hardware.pressure import CALM_OBSERVATIONS, TIGHT_OBSERVATIONS, Supply
from edged.serving.tuning import Tuning, combine, untuned
from edged.workers.protocol import Tune, WorkerSettings

SETTINGS = WorkerSettings(kind="chat", model="", threads=2, sequences=8, prefix_cache_bytes=64 << 20)


def after(*found: Supply, start: Tuning | None = None, shrinking: bool = True) -> Tuning:
    tuning = start or untuned(SETTINGS)
    for each in found:
        tuning = tuning.observe(each, SETTINGS, shrinking=shrinking)
    return tuning


def test_short_memory_halves_both_limits_each_time_down_to_one_sequence() -> None:
    halved = after(Supply.SHORT)
    assert (halved.sequences, halved.prefix_cache_bytes) == (4, 32 << 20)
    least = after(*[Supply.SHORT] * 20)
    assert (least.sequences, least.prefix_cache_bytes) == (1, 1 << 20)


def test_while_something_else_can_be_given_up_the_limits_stay() -> None:
    assert after(*[Supply.SHORT] * 20, shrinking=False) == untuned(SETTINGS)


def test_tight_memory_gives_back_much_later_than_plenty() -> None:
    halved = after(Supply.SHORT)
    nearly = [Supply.TIGHT] * (TIGHT_OBSERVATIONS - 1)
    assert after(*nearly, start=halved).sequences == 4
    assert after(*nearly, Supply.TIGHT, start=halved).sequences == 5


def test_after_plenty_for_a_while_one_sequence_more_is_allowed_at_a_time() -> None:
    halved = after(Supply.SHORT)
    nearly = [Supply.PLENTY] * (CALM_OBSERVATIONS - 1)
    assert after(*nearly, start=halved).sequences == 4
    assert after(*nearly, Supply.PLENTY, start=halved).sequences == 5
    assert after(*nearly, Supply.SHORT, *nearly, start=halved, shrinking=False).sequences == 4
    assert after(*[Supply.PLENTY] * CALM_OBSERVATIONS * 10, start=halved) == untuned(SETTINGS)


@given(st.lists(st.sampled_from(Supply), max_size=60))
def test_the_limits_stay_within_the_settings(found: list[Supply]) -> None:
    tuning = after(*found)
    assert 1 <= tuning.sequences <= SETTINGS.sequences
    assert 1 << 20 <= tuning.prefix_cache_bytes <= SETTINGS.prefix_cache_bytes


def test_the_smallest_limit_of_all_holds() -> None:
    full = untuned(SETTINGS)
    assert combine(full, STEPS[0], SETTINGS, threads=2) == Tune(sequences=8, threads=2, prefix_cache_bytes=64 << 20)
    assert combine(full, STEPS[1], SETTINGS, threads=2).sequences == 4
    assert combine(after(Supply.SHORT, Supply.SHORT), STEPS[1], SETTINGS, threads=9) == Tune(
        sequences=2, threads=2, prefix_cache_bytes=16 << 20
    )
    assert combine(full, STEPS[-1], SETTINGS, threads=1) == Tune(sequences=1, threads=1, prefix_cache_bytes=64 << 20)
