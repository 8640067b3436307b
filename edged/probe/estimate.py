"""What can be told from a look at each thread now and then, where nobody counts every event. Pure."""

from collections.abc import Mapping
from typing import Final

from edged.probe.procfs import TICKS_PER_SECOND, ThreadNow
from edged.probe.sample import HISTOGRAM_BUCKETS

Threads = Mapping[int, ThreadNow]
"""By thread number."""

LEAST_UNSEEN_TICKS: Final = 2
"""The process's account is in ticks and a little behind: what it has beyond the threads must be more than this."""


def cpu_seconds(before: Threads, after: Threads, cpu_ticks: int) -> dict[int, float]:
    """By core: each thread's time counts for the core on which it was seen last. ``cpu_ticks`` is what the process used
    in all; what its threads do not explain, others used that have ended: that is shared out alike."""
    spent: dict[int, float] = {}
    for number, now in after.items():
        spent[now.core] = spent.get(now.core, 0.0) + (now.cpu_nanoseconds - _past(before, number).cpu_nanoseconds) / 1e9
    seen, whole = sum(spent.values()), cpu_ticks / TICKS_PER_SECOND
    if whole - seen <= LEAST_UNSEEN_TICKS / TICKS_PER_SECOND:
        return spent
    if seen == 0:
        return dict.fromkeys(list(spent)[:1], whole)
    return {core: seconds * whole / seen for core, seconds in spent.items()}


def run_queue(before: Threads, after: Threads) -> tuple[int, ...]:
    """Delays by powers of two, as if each thread had waited equally long each time: the spread is not known."""
    counts = [0] * HISTOGRAM_BUCKETS
    for number, now in after.items():
        past = _past(before, number)
        turns = now.turns - past.turns
        if turns > 0:
            counts[bucket_of((now.delay_nanoseconds - past.delay_nanoseconds) / 1000 / turns)] += turns
    return tuple(counts)


def bucket_of(microseconds: float) -> int:
    """Where a delay counts: see :data:`~edged.probe.sample.HISTOGRAM_BUCKETS`."""
    return min(max(int(microseconds), 1).bit_length(), HISTOGRAM_BUCKETS) - 1


def _past(before: Threads, number: int) -> ThreadNow:
    """A thread that was not there had done nothing."""
    return before.get(number, ThreadNow(number, "", 0))
