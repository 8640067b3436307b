"""Where what was measured differs from what was planned: a worker off its cores, stopped by a quota, starved. Pure.

A profile tells what no look at affinities and counters can: where threads really ran, and how long the one in a hundred
waited for its core. A neighbour shows there in the first second.
"""

from collections.abc import Iterator
from typing import Any, Final, Literal

import msgspec

from edged.hardware.cores import format_list
from edged.hardware.neighbours import CROWDED_CORES, LEAST_RUN_SECONDS
from edged.hardware.placement import Bounds, Placement
from edged.models.rollout import Role
from edged.probe.profile import Figure, Profile, WorkerProfile

COUNTED_CONFIDENCE: Final = 0.9
"""Only what was counted, and not sampled or estimated, is reason enough to act."""
STRAYED_SHARE: Final = 0.05
STRAYED_SECONDS: Final = 0.02
THROTTLED_SHARE: Final = 0.1
STARVED_P99_US: Final = 2000.0
"""Threads alone on their cores wait microseconds; behind a busy neighbour one in a hundred waits for its time slice."""

CANDIDATE: Final = "chat-candidate"
"""A chat model that is tried beside the active one goes by this name in profiles."""

Kind = Literal["off_cores", "throttled", "starved"]


class Deviation(msgspec.Struct, frozen=True):
    """One process, and a sentence on what it did other than planned."""

    kind: Kind
    worker: str
    pid: int
    text: str


def deviations(profile: Profile, placement: Placement) -> Iterator[Deviation]:
    """All there are in a second."""
    for name, worker in profile.workers.items():
        bounds = _planned(name, placement)
        if bounds is None:
            continue
        found: dict[Kind, str] = {
            "off_cores": _off_cores(worker, bounds),
            "throttled": _throttled(worker, placement),
            "starved": _starved(worker, bounds, profile),
        }
        yield from (Deviation(kind, name, worker.pid, text) for kind, text in found.items() if text)


def blame(worker: WorkerProfile, own_pid: int) -> str:
    """Who changed the affinity of its threads last, other than edged; empty where nobody is known to have."""
    others = [change for change in worker.changed_by if change.caller_pid != own_pid]
    return f"changed by {others[-1].caller_name} (pid {others[-1].caller_pid})" if others else ""


def _planned(name: str, placement: Placement) -> Bounds | None:
    roles: dict[str, Role | Literal["daemon"]] = {
        "chat": "chat",
        CANDIDATE: "chat",
        "embed": "embed",
        "daemon": "daemon",
    }
    return placement.bounds(roles[name]) if name in roles else None


def _counted(figure: Figure[Any]) -> bool:
    return figure.confidence >= COUNTED_CONFIDENCE


def _off_cores(worker: WorkerProfile, bounds: Bounds) -> str:
    used = worker.cpu_seconds
    if used is None or not _counted(used):
        return ""
    strayed = {core: seconds for core, seconds in used.value.items() if core not in bounds.cores}
    lost = sum(strayed.values())
    if lost < max(STRAYED_SECONDS, STRAYED_SHARE * sum(used.value.values())):
        return ""
    where = format_list(core for core, seconds in strayed.items() if seconds)
    return f"it ran for {lost:.2f} s on cores {where}, not on cores {format_list(bounds.cores)}"


def _throttled(worker: WorkerProfile, placement: Placement) -> str:
    """A quota that is known is one for all: it stops them by plan where their threads are more than its cores."""
    share, quota = worker.throttled_share, placement.chat.quota_cores
    threads = placement.chat.threads + placement.embed.threads + placement.daemon.threads
    by_plan = quota is not None and threads > quota
    if share is None or by_plan or share.value < THROTTLED_SHARE:
        return ""
    return f"a CPU quota stopped it in {share.value:.0%} of its periods"


def _starved(worker: WorkerProfile, bounds: Bounds, profile: Profile) -> str:
    """It ran, its threads waited long, and somebody who is not of edged computed on its cores."""
    used, waited, busy = worker.cpu_seconds, worker.run_queue, profile.node.busy_seconds
    if used is None or waited is None or busy is None or not (_counted(used) and _counted(waited)):
        return ""
    p99 = waited.value.p99_us
    if p99 is None or p99 < STARVED_P99_US or sum(used.value.values()) < LEAST_RUN_SECONDS:
        return ""
    foreign = _foreign_seconds(profile, bounds.cores, busy.value)
    if foreign < CROWDED_CORES * profile.seconds:
        return ""
    return f"one in a hundred of its waits for cores {format_list(bounds.cores)} took {p99 / 1e3:.1f} ms or more"


def _foreign_seconds(profile: Profile, cores: tuple[int, ...], busy: dict[int, float]) -> float:
    ours = sum(
        worker.cpu_seconds.value.get(core, 0.0)
        for worker in profile.workers.values()
        if worker.cpu_seconds is not None
        for core in cores
    )
    return max(0.0, sum(busy.get(core, 0.0) for core in cores) - ours)
