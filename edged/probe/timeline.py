"""What was measured of a worker by several means, on one axis of time; pure."""

from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from edged.probe.profile import Figure, Profile, WorkerProfile
from edged.probe.stacks import Slice, innermost

SCHEMA: Final = 1
INNERMOST_KEPT: Final = 5
GAP_SECONDS: Final = 2.5

Shape = Literal["level", "rate"]
"""A ``level`` is as at its moment, a ``rate`` a mean over the time before it: it stands in the middle of that."""

Point = tuple[float, float]
"""Seconds from the beginning of the timeline, and a value."""


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One measured value over time; nothing is known between points further apart than :data:`GAP_SECONDS`."""

    name: str
    title: str
    unit: str
    shape: Shape
    sources: tuple[str, ...]
    points: tuple[Point, ...]


class SliceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A slice of sampled stacks, in seconds from the beginning; ``innermost`` frames with their shares of it."""

    begin: float
    end: float
    samples: int
    innermost: list[tuple[str, float]]


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """``begin`` is in seconds since 1970; everything else counts from it. ``notes`` say what is missing and why."""

    schema: int = SCHEMA
    role: str
    pid: int
    begin: float
    seconds: float
    series: tuple[Series, ...]
    slices: tuple[SliceSummary, ...]
    notes: tuple[str, ...]


class _Read(msgspec.Struct, frozen=True):
    """How a series is read from the profile of one second."""

    name: str
    title: str
    unit: str
    shape: Shape
    figure: Callable[[WorkerProfile], Figure[float] | None]


def _scaled(figure: Figure[int] | Figure[float] | None, factor: float) -> Figure[float] | None:
    if figure is None:
        return None
    return Figure(figure.value * factor, figure.seconds, figure.sources, figure.confidence)


def _cores(worker: WorkerProfile) -> Figure[float] | None:
    used = worker.cpu_seconds
    if used is None or not used.seconds:
        return None
    return Figure(sum(used.value.values()) / used.seconds, used.seconds, used.sources, used.confidence)


def _run_queue(worker: WorkerProfile) -> Figure[float] | None:
    delays = worker.run_queue
    if delays is None or delays.value.p99_us is None:
        return None
    return Figure(delays.value.p99_us / 1e3, delays.seconds, delays.sources, delays.confidence)


_READS: Final = (
    _Read("resident", "Memory in RAM", "MB", "level", lambda worker: _scaled(worker.resident_bytes, 1e-6)),
    _Read(
        "anonymous", "Of it, its own (anonymous)", "MB", "level", lambda worker: _scaled(worker.anonymous_bytes, 1e-6)
    ),
    _Read("cores", "CPU", "cores", "rate", _cores),
    _Read("run_queue_p99", "Wait for a core, 99th percentile", "ms", "rate", _run_queue),
    _Read("tokens", "Generated", "tokens/s", "rate", lambda worker: worker.tokens_per_second),
)


def timeline(
    *,
    role: str,
    pid: int,
    begin: float,
    end: float,
    profiles: Sequence[Profile],
    heap: Sequence[Point],
    slices: Sequence[Slice],
    notes: Sequence[str] = (),
) -> Timeline:
    """Everything between ``begin`` and ``end``, seconds since 1970.

    ``heap`` is what memray counts as allocated since it began and not freed, bytes at moments since 1970. What another
    process of the role did is left out.
    """
    seconds = [each for each in profiles if begin <= each.at <= end and role in each.workers]
    own = [each for each in seconds if each.workers[role].pid == pid]
    series = [_series(read, role, begin, own) for read in _READS]
    series.append(_heap(begin, end, heap))
    said = list(notes)
    if len(own) < len(seconds):
        said.append("the worker's process was another for a part of the time")
    if not own:
        said.append("no profile came: probe.enabled must be true")
    return Timeline(
        role=role,
        pid=pid,
        begin=begin,
        seconds=end - begin,
        series=tuple(each for each in series if each.points),
        slices=tuple(_summary(each, begin, end) for each in slices if each.begin < end),
        notes=tuple(said),
    )


def _series(read: _Read, role: str, begin: float, profiles: Sequence[Profile]) -> Series:
    points: list[Point] = []
    sources: set[str] = set()
    for each in profiles:
        figure = read.figure(each.workers[role])
        if figure is None:
            continue
        at = (each.at - each.seconds / 2 if read.shape == "rate" else each.at) - begin
        if at >= 0:
            points.append((round(at, 3), figure.value))
            sources.update(figure.sources)
    return Series(
        name=read.name,
        title=read.title,
        unit=read.unit,
        shape=read.shape,
        sources=tuple(sorted(sources)),
        points=tuple(points),
    )


def _heap(begin: float, end: float, heap: Sequence[Point]) -> Series:
    return Series(
        name="heap",
        title="Allocated since the beginning and not freed",
        unit="MB",
        shape="level",
        sources=("memray",),
        points=tuple((round(at - begin, 3), bytes_ / 1e6) for at, bytes_ in heap if begin <= at <= end),
    )


def _summary(each: Slice, begin: float, end: float) -> SliceSummary:
    return SliceSummary(
        begin=round(each.begin - begin, 3),
        end=round(min(each.end, end) - begin, 3),
        samples=each.samples,
        innermost=innermost(each.stacks, INNERMOST_KEPT),
    )
