"""One sample a second from the best means there are: each field from the most trusted source that has it."""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog

from edged.errors import ProbeError
from edged.probe import counters, groups, loading, procfs
from edged.probe.follower import Fields, Follower, best
from edged.probe.kernel import Counted, KernelProbe, Reading
from edged.probe.ladder import Ladder, Obstacles
from edged.probe.loading import Loading
from edged.probe.node import Node
from edged.probe.sample import Cost, Measured, ProcessSample, Sample, Source, Step, Watched

LOOK_EVERY_SECONDS: Final = 10.0
"""For obstacles that have gone or come."""
COMPILING: Final = "the eBPF programs are being compiled"
WITHOUT_WRITEBACK: Final = 0.8
"""Confidence in written bytes where those are missing that the kernel writes out later, by itself."""


def survey() -> dict[Step, str]:
    """What is in the way of each step now."""
    found = {Step.EBPF: loading.obstacle()}
    if not (counters.available() or groups.has_groups() or groups.stalled_seconds()):
        found[Step.COUNTERS] = (
            "no performance counters (kernel.perf_event_paranoid), no cgroups v2, no pressure accounts (psi=1)"
        )
    return {step: obstacle for step, obstacle in found.items() if obstacle}


class Sampler:
    """Measures the watched processes. Calls may block for some milliseconds, and must not overlap.

    It does not go beyond the step ``highest``. ``is_alone`` in its process: what measuring costs is then the process's;
    else it is the calling thread's.
    """

    def __init__(
        self,
        highest: Step,
        *,
        is_alone: bool = False,
        survey: Callable[[], Obstacles] = survey,
    ) -> None:
        self._log = structlog.get_logger("probe")
        self._clock = time.process_time if is_alone else time.thread_time
        self._is_alone = is_alone
        self._survey = survey
        self._obstacles: Obstacles = {}
        self._look_at = time.monotonic()
        self._ladder = Ladder(highest)
        self._loading: Loading | None = None
        self._kernel: KernelProbe | None = None
        self._events: dict[str, bool] = {}
        self._followers: dict[Watched, Follower] = {}
        self._node = Node()
        self._sampled_at = time.monotonic()
        self._spent = self._clock()
        self._climb()

    @property
    def is_loading(self) -> bool:
        """The next step up is on its way: :meth:`sample` takes it."""
        return self._loading is not None

    def watch(self, processes: Sequence[Watched]) -> None:
        """Measure these from now on, and no others. Who is gone, or goes, is left out of the samples."""
        if not self._followers:
            self._begin()  # nobody asked what happened before
        left = [each for each, follower in self._followers.items() if follower.is_gone or each not in processes]
        for watched in left:
            self._followers.pop(watched).close()
        for watched in processes:
            if watched not in self._followers:
                self._followers[watched] = self._follow(watched)
        if self._kernel is not None:
            try:
                self._kernel.watch(self._pids())
            except OSError as error:
                self._fall(f"the kernel refused: {error}")

    def sample(self, now: float) -> Sample:
        """What happened since the last sample; ``now`` is Unix time in seconds.

        The first one that has a process covers for it the time since it is watched.
        """
        reading = self._read_kernel()
        moment = time.monotonic()
        seconds, self._sampled_at = moment - self._sampled_at, moment
        step, reason = self._ladder.step, self._reason()
        sample = Sample(
            at=now,
            seconds=seconds,
            step=step,
            reason=reason,
            processes=tuple(self._processes(reading)),
            node=self._node.measure(seconds, with_groups=step is not Step.PROCFS),
            cost=self._cost(reading),
        )
        self._climb()  # now, so that what is new begins with the next sample
        return sample

    def close(self) -> None:
        """Give everything back that was asked of the kernel."""
        for follower in self._followers.values():
            follower.close()
        self._followers.clear()
        self._end_loading()
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    # --- the ladder ----------------------------------------------------------------------------------

    def _climb(self) -> None:
        moment = time.monotonic()
        if moment >= self._look_at:
            self._look_at = moment + LOOK_EVERY_SECONDS
            self._obstacles = self._survey()
        for step in self._ladder.attempts(self._obstacles, moment):
            if step is Step.COUNTERS:
                self._use_counters()
            elif self._loading is None:
                self._log.info("probe_compiling")
                self._loading = Loading()
        if self._loading is not None:
            self._take_programs(self._loading)

    def _use_counters(self) -> None:
        self._events = counters.available()
        for follower in self._followers.values():
            follower.count(self._events)
        self._reach(Step.COUNTERS)

    def _take_programs(self, coming: Loading) -> None:
        try:
            programs = coming.poll()
            if programs is None:
                return
            self._end_loading()
            self._kernel = KernelProbe(programs)
            self._kernel.watch(self._pids())
        except (ProbeError, OSError) as error:
            self._end_loading()
            self._fall(str(error))
        else:
            self._reach(Step.EBPF)

    def _reach(self, step: Step) -> None:
        self._ladder.reached(step)
        self._log.info("probe_step", step=step.value, reason=self._reason())

    def _fall(self, reason: str) -> None:
        """From the top, or on the way there."""
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None
        self._ladder.failed(Step.EBPF, reason, time.monotonic(), random.random())  # noqa: S311  # jitter, no secret
        self._log.warning("probe_step", step=self._ladder.step.value, reason=reason)

    def _end_loading(self) -> None:
        if self._loading is not None:
            self._loading.close()
            self._loading = None

    def _reason(self) -> str:
        if self._loading is not None:
            return COMPILING
        return self._ladder.reason(self._obstacles)

    # --- the parts of a sample -----------------------------------------------------------------------

    def _begin(self) -> None:
        """What comes next is measured from here on."""
        self._node = Node()
        self._sampled_at = time.monotonic()
        self._spent = self._clock()

    def _follow(self, watched: Watched) -> Follower:
        follower = Follower(watched)
        if self._ladder.step is not Step.PROCFS:
            follower.count(self._events)
        return follower

    def _pids(self) -> list[int]:
        return [watched.pid for watched in self._followers]

    def _read_kernel(self) -> Reading | None:
        if self._kernel is None:
            return None
        try:
            return self._kernel.read()
        except OSError as error:
            self._fall(f"the kernel refused: {error}")
            return None

    def _processes(self, reading: Reading | None) -> Iterator[ProcessSample]:
        for watched, follower in self._followers.items():
            counted = reading.processes.get(watched.pid) if reading is not None else None
            fields = follower.measure(with_threads=counted is None)
            if fields is not None:
                merged = best(_of_programs(counted), fields) if counted is not None else fields
                yield ProcessSample(name=watched.name, pid=watched.pid, threads=follower.threads, **merged)

    def _cost(self, reading: Reading | None) -> Cost:
        spent, self._spent = self._spent, self._clock()
        memory = procfs.memory_of(os.getpid()) if self._is_alone else None
        return Cost(
            cpu_seconds=self._spent - spent,
            resident_bytes=memory.file_bytes + memory.anonymous_bytes if memory is not None else 0,
            kernel_seconds=reading.own_seconds if reading is not None else None,
        )


def _of_programs(counted: Counted) -> Fields:
    every = {name: Measured(getattr(counted, name), Source.EBPF, 1.0) for name in counted.__struct_fields__}
    return {**every, "written_bytes": Measured(counted.written_bytes, Source.EBPF, WITHOUT_WRITEBACK)}
