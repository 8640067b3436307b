"""Percentiles out of counts by powers of two, compared with those of the delays themselves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.probe.histogram import NONE, add, lower_bound, quantile
from edged.probe.sample import HISTOGRAM_BUCKETS
from tests.samples import histogram

DELAYS = st.lists(st.floats(0.0, 2.0**28, allow_nan=False), min_size=1, max_size=300)
SHARES = st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.99, 1.0])


def bucket_of(delay: float) -> int:
    return min(HISTOGRAM_BUCKETS - 1, int(math.log2(delay))) if delay >= 1 else 0


def counts_of(delays: list[float]) -> tuple[int, ...]:
    found = [0] * HISTOGRAM_BUCKETS
    for delay in delays:
        found[bucket_of(delay)] += 1
    return tuple(found)


@given(DELAYS, SHARES)
def test_a_percentile_lies_in_the_bucket_of_the_true_one(delays: list[float], share: float) -> None:
    true = float(np.percentile(delays, share * 100, method="inverted_cdf"))
    bucket = bucket_of(true)
    found = quantile(counts_of(delays), share)
    assert found is not None
    last = bucket == HISTOGRAM_BUCKETS - 1
    assert lower_bound(bucket) <= found
    assert found <= (lower_bound(bucket) if last else lower_bound(bucket + 1))


def test_delays_spread_evenly_in_a_bucket_give_their_percentiles() -> None:
    delays = np.linspace(1024, 2048, 1000, endpoint=False)
    found = quantile(counts_of(list(delays)), 0.25)
    assert found == pytest.approx(float(np.percentile(delays, 25)), rel=0.01)


def test_without_any_delay_there_is_no_percentile() -> None:
    assert quantile(NONE, 0.99) is None


def test_the_last_bucket_has_no_end_and_gives_its_beginning() -> None:
    assert quantile(histogram(b26=5), 0.99) == 2.0**26


@given(DELAYS, DELAYS)
def test_counts_added_up_are_those_of_all_delays(first: list[float], second: list[float]) -> None:
    assert add([counts_of(first), counts_of(second)]) == counts_of(first + second)


def test_nothing_added_up_has_no_counts() -> None:
    assert add([]) == NONE
