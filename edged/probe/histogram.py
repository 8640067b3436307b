"""Delays counted by powers of two: adding counts up, and reading percentiles from them."""

from collections.abc import Sequence

from edged.probe.sample import HISTOGRAM_BUCKETS

NONE: tuple[int, ...] = (0,) * HISTOGRAM_BUCKETS


def lower_bound(bucket: int) -> float:
    """Microseconds from which on a delay counts in ``bucket``: the first one begins at 0."""
    return float(1 << bucket) if bucket else 0.0


def add(histograms: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The counts of all of them; none at all is a histogram without counts."""
    return tuple(sum(column) for column in zip(*histograms, strict=True)) if histograms else NONE


def quantile(counts: Sequence[int], share: float) -> float | None:
    """The delay in microseconds that ``share`` of the delays, 0 to 1, do not exceed; None without any count.

    Within a bucket delays are taken as spread evenly, so the result lies in the right bucket and is exact to a factor
    of two. The last bucket has no end: its beginning is returned.
    """
    wanted = share * sum(counts)
    reached = 0
    last = None
    for bucket, count in enumerate(counts):
        if not count:
            continue
        last = bucket
        if reached + count >= wanted:
            return _within(bucket, (wanted - reached) / count)
        reached += count
    return None if last is None else _within(last, 1.0)


def _within(bucket: int, part: float) -> float:
    begin = lower_bound(bucket)
    if bucket == HISTOGRAM_BUCKETS - 1:
        return begin
    return begin + (lower_bound(bucket + 1) - begin) * max(0.0, part)
