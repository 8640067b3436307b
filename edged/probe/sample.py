"""One second of measurement, as the probe sends it to the daemon: what each watched process used, and where each
figure comes from. Pure data; the same whatever could be measured, and with what.
"""

from enum import StrEnum
from typing import Final, Generic, TypeVar

import msgspec

VERSION: Final = 1
"""Of the frames between probe and daemon. Both belong to one installation; another version is refused by name."""

HISTOGRAM_BUCKETS: Final = 27
"""Delays are counted by powers of two: bucket ``i`` holds ``2**i <= microseconds < 2**(i+1)``, bucket 0 also less
than 1, the last one (from 67 s on) also more."""

T = TypeVar("T")


class Source(StrEnum):
    """What measured a figure."""

    EBPF = "ebpf"
    PERF = "perf_event"
    CGROUP = "cgroup"
    PRESSURE = "psi"
    PROCFS = "procfs"
    WORKER = "worker"
    SENSOR = "sensor"


class Step(StrEnum):
    """The ladder, from the top: which means of measurement are in use."""

    EBPF = "ebpf"
    COUNTERS = "counters"
    PROCFS = "procfs"


class Measured(msgspec.Struct, Generic[T], frozen=True):
    """A figure with what measured it, and how far to trust it: 1 counts every event, less samples or estimates."""

    value: T
    source: Source
    confidence: float


Count = Measured[int]
Seconds = Measured[float]
Histogram = Measured[tuple[int, ...]]
"""Of :data:`HISTOGRAM_BUCKETS` counts."""


class AffinityChange(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody's ``sched_setaffinity`` on a watched process: who, on which thread of whom."""

    caller_pid: int
    caller_name: str
    thread: int


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """A process to be measured: ``name`` is its role (``chat``, ``embed``, ``daemon``), ``group`` the path of its
    cgroup below the mount, or empty."""

    name: str
    pid: int
    group: str = ""


class ProcessSample(msgspec.Struct, frozen=True, kw_only=True):
    """What one watched process used in the time of the sample; None is what could not be measured.

    ``cpu_seconds``: on each core. ``run_queue``: how long threads that could run waited for a core.
    ``off_cpu_seconds``: by reason, summed over threads: ``preempted`` (could run), ``sleeping`` (interruptible wait),
    ``waiting`` (uninterruptible: the disk, mostly), ``stolen`` (on a core that a hypervisor or an interrupt had
    meanwhile). ``throttled_share``: of the periods of its CPU quota, 0 to 1.
    ``io_delay``: each block request's time, from issue to completion. ``resident_bytes`` and its two parts are as at
    the end; all others count what happened in between.
    """

    name: str
    pid: int
    threads: int
    cpu_seconds: Measured[dict[int, float]] | None = None
    run_queue: Histogram | None = None
    off_cpu_seconds: Measured[dict[str, float]] | None = None
    migrations: Count | None = None
    affinity_changes: Measured[tuple[AffinityChange, ...]] | None = None
    minor_faults: Count | None = None
    major_faults: Count | None = None
    read_bytes: Count | None = None
    written_bytes: Count | None = None
    io_delay: Histogram | None = None
    throttled_share: Measured[float] | None = None
    cycles: Count | None = None
    instructions: Count | None = None
    cache_misses: Count | None = None
    resident_bytes: Count | None = None
    file_bytes: Count | None = None
    anonymous_bytes: Count | None = None


class NodeSample(msgspec.Struct, frozen=True, kw_only=True):
    """The whole device. ``busy_seconds``: on each core, whoever computed. ``stalled``: shares of the time in which some
    process waited, by resource (``cpu``, ``memory``, ``io``)."""

    busy_seconds: Measured[dict[int, float]] | None = None
    stalled: Measured[dict[str, float]] | None = None
    available_bytes: Count | None = None
    total_bytes: int = 0
    joules: Seconds | None = None


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What measuring cost in the time of the sample: the probe's own process and, where the kernel tells, its
    programs (``kernel_seconds``, from bpf_stats or estimated)."""

    cpu_seconds: float
    resident_bytes: int
    kernel_seconds: float | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """``at``: end of the measurement, seconds since 1970; ``seconds``: its length, by the monotonic clock. ``reason``:
    why ``step`` is not higher, empty at the top."""

    version: int = VERSION
    at: float
    seconds: float
    step: Step
    reason: str = ""
    processes: tuple[ProcessSample, ...]
    node: NodeSample
    cost: Cost
