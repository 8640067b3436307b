"""Whether somebody else keeps one of the chat worker's cores: measured from proc(5), decided purely.

A worker whose threads wait for a core computes at the pace of the one that waits longest; with one thread fewer none
does. That a neighbour came shows in the time its threads wait (kernel: scheduler/sched-stats.rst, second field of
``schedstat``). That it left does not, because nobody waits any more; the time its cores are busy for others tells.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

PROC: Final = Path("/proc")

CROWDED_WAIT: Final = 0.15
CROWDED_CORES: Final = 0.5
CROWDED_OBSERVATIONS: Final = 2
FREE_CORES: Final = 0.25
FREE_OBSERVATIONS: Final = 5
LEAST_RUN_SECONDS: Final = 0.2


class Scheduled(msgspec.Struct, frozen=True):
    """Nanoseconds for which the threads of a process ran, and waited for a core though they could run."""

    run: int = 0
    waited: int = 0


def read_scheduled(pid: int, proc: Path = PROC) -> Scheduled:
    """The sums over all threads that live; zeros for a process that is gone or a kernel that does not count."""
    run = waited = 0
    for file in (proc / str(pid) / "task").glob("*/schedstat"):
        try:
            ran, delayed, _ = file.read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue
        run, waited = run + int(ran), waited + int(delayed)
    return Scheduled(run, waited)


def read_busy_seconds(cores: Iterable[int], proc: Path = PROC) -> float:
    """How long these cores have been busy since the boot, all together; time of other guests does not count."""
    wanted = {f"cpu{number}" for number in cores}
    ticks = 0
    try:
        lines = (proc / "stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    for line in lines:
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK")


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """What happened on the chat worker's cores between two readings.

    Its threads ran for ``run_seconds`` in all and waited for ``wait_share`` of the time in which they wanted to run;
    others kept so many cores busy (``foreign_cores``).
    """

    run_seconds: float
    wait_share: float
    foreign_cores: float


def crowd(
    before: Scheduled,
    after: Scheduled,
    *,
    busy_seconds: float,
    own_seconds: float,
    seconds: float,
    quota_cores: float | None = None,
) -> Crowd | None:
    """From two readings of the chat worker, ``seconds`` apart. ``own_seconds`` of the cores' ``busy_seconds`` are ours.

    A thread that the quota stops waits as well, and the kernel does not tell why: only what is missing to the quota was
    taken by others. None where the readings are of different processes.
    """
    run, waited = (after.run - before.run) / 1e9, (after.waited - before.waited) / 1e9
    if run < 0 or waited < 0 or seconds <= 0:
        return None
    wanted = run + waited
    if quota_cores is not None:
        wanted = min(wanted, quota_cores * seconds - (own_seconds - run))
    return Crowd(
        run_seconds=run,
        wait_share=max(0.0, 1.0 - run / wanted) if wanted > 0 else 0.0,
        foreign_cores=max(0.0, busy_seconds - own_seconds) / seconds,
    )


def vacant(*, busy_seconds: float, own_seconds: float, seconds: float) -> Crowd:
    """The same while no chat worker is there: its cores' time tells alone whether others use them."""
    foreign = max(0.0, busy_seconds - own_seconds) / seconds if seconds > 0 else 0.0
    return Crowd(run_seconds=0.0, wait_share=0.0, foreign_cores=foreign)


class Neighbours(msgspec.Struct, frozen=True):
    """Whether a core is kept (``crowded``); ``signs`` counts observations in a row that say otherwise."""

    crowded: bool = False
    signs: int = 0

    def observe(self, found: Crowd | None, *, starved: bool = False) -> "Neighbours":
        """The next state. A worker that hardly ran tells nothing of those that come, but they may be seen leaving.

        ``starved``: every wait was counted, and behind others they were long: that needs no second look.
        """
        if starved:
            return Neighbours(crowded=True)
        if found is None:
            return Neighbours(self.crowded)
        if self.crowded:
            return self._count(found.foreign_cores < FREE_CORES, FREE_OBSERVATIONS)
        waits = found.run_seconds >= LEAST_RUN_SECONDS and found.wait_share >= CROWDED_WAIT
        return self._count(waits and found.foreign_cores >= CROWDED_CORES, CROWDED_OBSERVATIONS)

    def _count(self, sign: bool, needed: int) -> "Neighbours":  # noqa: FBT001
        if not sign:
            return Neighbours(self.crowded)
        if self.signs + 1 < needed:
            return Neighbours(self.crowded, self.signs + 1)
        return Neighbours(not self.crowded)
