"""One watched process, by every means but our own programs: the fields of its sample, each with its source."""

from collections.abc import Mapping
from typing import Any

from edged.probe import estimate, groups, procfs
from edged.probe.counters import Counters
from edged.probe.procfs import ProcessNow, Transferred
from edged.probe.sample import Measured, Source, Watched

Fields = dict[str, Measured[Any]]
"""Fields of :class:`~edged.probe.sample.ProcessSample` by name."""

WHERE_SEEN_LAST = 0.5
"""Confidence in the cores of time whose sum is known."""
SPREAD_UNKNOWN = 0.3
"""In a histogram of which only the mean is known."""
WRITTEN_LATER = 0.9
"""In bytes that count when the device writes them, a while after the process did."""


def best(*layers: Mapping[str, Measured[Any]]) -> Fields:
    """Of each field the most trusted measurement, of equal ones the first."""
    found: Fields = {}
    for layer in layers:
        for name, measured in layer.items():
            if name not in found or measured.confidence > found[name].confidence:
                found[name] = measured
    return found


class Follower:
    """Measures from its making on. A number that another process has been given since is not followed further."""

    def __init__(self, watched: Watched) -> None:
        self.threads = 0
        self.is_gone = False
        self._watched = watched
        self._process = procfs.process_now(watched.pid)
        self._transferred = procfs.transferred_by(watched.pid)
        self._threads: estimate.Threads | None = None
        self._counters: Counters | None = None
        self._periods: list[groups.Periods] = []
        self._group_transferred: Transferred | None = None

    def count(self, events: Mapping[str, bool]) -> None:
        """From now on also by the processor's counters and the process's cgroup."""
        self._counters = Counters(self._watched.pid, events)
        self._periods = groups.periods_of(self._watched.group)
        self._group_transferred = groups.transferred_by(self._watched.group)

    def measure(self, *, with_threads: bool) -> Fields | None:
        """Since the last time; None when the process is gone. ``with_threads``: look at each of them, and estimate what
        nobody counts."""
        now, before = procfs.process_now(self._watched.pid), self._process
        if now is None or before is None or now.began != before.began:
            self.is_gone = True
            return None
        self._process, self.threads = now, now.threads
        layers = [self._of_process(before, now)]
        if self._counters is not None:
            layers += [self._counted(self._counters), self._of_group()]
        layers.append(self._of_threads(now.cpu_ticks - before.cpu_ticks, wanted=with_threads))
        return best(*layers)

    def close(self) -> None:
        if self._counters is not None:
            self._counters.close()

    def _of_process(self, before: ProcessNow, now: ProcessNow) -> Fields:
        figures = {
            "minor_faults": now.minor_faults - before.minor_faults,
            "major_faults": now.major_faults - before.major_faults,
        }
        if memory := procfs.memory_of(self._watched.pid):
            figures["resident_bytes"] = memory.file_bytes + memory.anonymous_bytes
            figures["file_bytes"], figures["anonymous_bytes"] = memory.file_bytes, memory.anonymous_bytes
        transferred, past = procfs.transferred_by(self._watched.pid), self._transferred
        self._transferred = transferred
        figures |= _passed(past, transferred)
        return {name: Measured(value, Source.PROCFS, 1.0) for name, value in figures.items()}

    def _counted(self, counters: Counters) -> Fields:
        counts = counters.read()
        return {event: Measured(count.value, Source.PERF, count.share) for event, count in counts.items()}

    def _of_group(self) -> Fields:
        transferred, past = groups.transferred_by(self._watched.group), self._group_transferred
        self._group_transferred = transferred
        fields: Fields = {
            name: Measured(value, Source.CGROUP, WRITTEN_LATER) for name, value in _passed(past, transferred).items()
        }
        periods, before = groups.periods_of(self._watched.group), self._periods
        self._periods = periods
        if periods and len(periods) == len(before):
            shares = [groups.stopped_share(old, new) for old, new in zip(before, periods, strict=True)]
            fields["throttled_share"] = Measured(max(shares), Source.CGROUP, 1.0)
        return fields

    def _of_threads(self, cpu_ticks: int, *, wanted: bool) -> Fields:
        before = self._threads
        self._threads = {each.number: each for each in procfs.threads_now(self._watched.pid)} if wanted else None
        if before is None or self._threads is None:
            return {}
        cpu_seconds = estimate.cpu_seconds(before, self._threads, cpu_ticks)
        delays = estimate.run_queue(before, self._threads)
        return {
            "cpu_seconds": Measured(cpu_seconds, Source.PROCFS, WHERE_SEEN_LAST),
            "run_queue": Measured(delays, Source.PROCFS, SPREAD_UNKNOWN),
        }


def _passed(before: Transferred | None, now: Transferred | None) -> dict[str, int]:
    if before is None or now is None:
        return {}
    return {
        "read_bytes": max(0, now.read_bytes - before.read_bytes),
        "written_bytes": max(0, now.written_bytes - before.written_bytes),
    }
