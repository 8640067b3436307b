"""Which cores, threads, CPU time and memory each process gets: one decision, pure.

llama.cpp's threads wait for each other at barriers, so a thread without a core of its own, or one that the quota
stops, stops them all: threads ≤ min(cores, the quota in cores, rounded). The slowest core sets the pace of all, so the
chat worker computes on the fastest alone, unless there are many more that are not much slower; the embedder and the
daemon get the rest. On few equal cores all share all and weights decide: a question is embedded before its answer is
generated and waiting threads sleep, only documents that are added meanwhile make the workers compete.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from edged.hardware.cores import Core

AS_FAST = 0.8
"""Cores of at least this part of the fastest one's speed count as fast: clusters of one kind differ in frequency."""
WORTH_SLOWER = 2.5
"""Slower cores take part where all of them at the pace of the slowest compute so many times as much: 2 fast ones and 8
of 0.75 do (7.5 beside 2). So many, because a frequency, where that is all that is known, flatters small cores: all six
of an RK3399 seem 2.4 times as fast as its big two and are not. By speeds alone, not measured on such processors."""
SHARED_CORES = 2
"""So many equal cores are too few to be divided."""
CORES_A_SPARE_ONE = 4
"""Of equal cores, one in so many is left to the embedder and the daemon, and at least one."""

CHAT_WEIGHT, EMBED_WEIGHT, DAEMON_WEIGHT = 500, 100, 1000
"""cgroup v2's ``cpu.weight``; 100 is everybody else's. The daemon needs little, and all others wait for it."""
CHAT_NICE, EMBED_NICE, DAEMON_NICE = 0, 5, 0

HIGH_FACTOR, HIGH_BYTES = 1.10, 32 << 20
MAX_FACTOR, MAX_BYTES = 1.25, 64 << 20
"""Above what a worker is estimated to need: where it is slowed to give memory back, and where it is killed. Pages of
the mapped model are charged to it, so a limit below the need would have it read the model from disk for ever."""
DAEMON_MEMORY_SHARE = 0.5
LARGEST_PAGE_BYTES = 65_536

SPARE_TASKS = 64
TASKS_A_CORE = 4

Name = Literal["chat", "embed", "daemon"]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The ``cores`` this process may use, how much time of them (``quota_cores``, None: all), and all its memory."""

    cores: tuple[Core, ...]
    quota_cores: float | None = None
    memory_bytes: int | None = None

    @classmethod
    def of(cls, cores: int, quota_cores: float | None = None) -> "Machine":
        """A machine with so many equal cores."""
        return cls(cores=tuple(Core(n, 1.0, frozenset({n})) for n in range(cores)), quota_cores=quota_cores)


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration asks for. Threads other than 0 are taken as they are.

    ``share`` is the part of all cores' time that a worker may use; with ``reserve_cores`` nobody else is to use the
    chat worker's cores.
    """

    chat_threads: int = 0
    embed_threads: int = 0
    share: float = 1.0
    reserve_cores: bool = False


class Strain(msgspec.Struct, frozen=True, kw_only=True):
    """What the device cannot give now: heat leaves ``thread_share`` of the threads, a neighbour keeps a core
    (``crowded``)."""

    thread_share: float = 1.0
    crowded: bool = False


NO_STRAIN = Strain()


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What one process gets. ``quota_cores`` and the bytes are None where it is not limited; ``nice`` stands in for
    ``weight`` where there are no cgroups."""

    cores: tuple[int, ...]
    threads: int
    weight: int
    nice: int
    quota_cores: float | None = None
    memory_high: int | None = None
    memory_max: int | None = None
    tasks_max: int | None = None


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """The decision. ``reserved`` are the cores that others are to keep off."""

    chat: Bounds
    embed: Bounds
    daemon: Bounds
    reserved: tuple[int, ...] = ()

    @property
    def chat_threads(self) -> int:
        return self.chat.threads

    @property
    def embed_threads(self) -> int:
        return self.embed.threads

    def bounds(self, name: Name) -> Bounds:
        return {"chat": self.chat, "embed": self.embed, "daemon": self.daemon}[name]


def place(
    machine: Machine,
    wishes: Wishes | None = None,
    *,
    chat_bytes: int | None = None,
    embed_bytes: int | None = None,
    strain: Strain = NO_STRAIN,
) -> Placement:
    """The decision for a machine; ``chat_bytes`` and ``embed_bytes`` are what their workers need, once that is known.

    Every process gets at least one core and one thread.
    """
    wishes = wishes or Wishes()
    quota = _quota(machine, wishes)
    fast, rest = _divide(machine.cores)
    fast, full = _chat(machine, wishes, fast, quota)
    if wishes.reserve_cores and not wishes.chat_threads:
        full = max(1, min(full, len(machine.cores) - 1))  # somewhere the others have to be
    if wishes.reserve_cores and len(machine.cores) > full:
        fast = fast[:full]
        rest = [core for core in _fastest_first(machine.cores) if core not in fast]
    threads = max(1, math.floor(full * strain.thread_share) - strain.crowded)
    spare = wishes.embed_threads or min(len(rest), full // 2)
    embed_threads = max(1, math.floor(spare * strain.thread_share))
    return Placement(
        chat=_worker(fast, threads, quota, chat_bytes, weight=CHAT_WEIGHT, nice=CHAT_NICE),
        embed=_worker(
            rest,
            embed_threads,
            quota,
            embed_bytes,
            weight=EMBED_WEIGHT,
            nice=EMBED_NICE,
        ),
        daemon=Bounds(
            cores=_numbers(rest),
            threads=1,
            weight=DAEMON_WEIGHT,
            nice=DAEMON_NICE,
            memory_high=None if machine.memory_bytes is None else _pages(machine.memory_bytes * DAEMON_MEMORY_SHARE),
        ),
        reserved=_numbers(fast) if wishes.reserve_cores and not set(fast) & set(rest) else (),
    )


def _quota(machine: Machine, wishes: Wishes) -> float | None:
    """The tighter of what the system allows and what the configuration does."""
    wished = wishes.share * len(machine.cores) if wishes.share < 1 else None
    return min((each for each in (machine.quota_cores, wished) if each is not None), default=None)


def _divide(cores: Sequence[Core]) -> tuple[list[Core], list[Core]]:
    """Those for the chat worker, and those for the embedder and the daemon; both are all where there are few."""
    ordered = _fastest_first(cores)
    least = _least_speed(cores)
    fast = [core for core in ordered if core.speed >= least]
    slow = [core for core in ordered if core.speed < least]
    if slow:
        return fast, slow
    if len(ordered) <= SHARED_CORES:
        return ordered, ordered
    spare = max(1, len(ordered) // CORES_A_SPARE_ONE)
    return ordered[:-spare], ordered[-spare:]


def _least_speed(cores: Sequence[Core]) -> float:
    """From what speed on a core computes for the chat worker."""
    speeds = sorted(max(core.speed for core in cores if core.siblings == one) for one in {c.siblings for c in cores})
    fast = AS_FAST * speeds[-1]

    def power(least: float) -> float:
        return least * sum(speed >= least for speed in speeds)

    pace = min(speed for speed in speeds if speed >= fast)
    best = max(speeds, key=power)
    return best if power(best) >= WORTH_SLOWER * power(pace) else fast


def _fastest_first(cores: Sequence[Core]) -> list[Core]:
    """The fastest first, and of each physical core the first thread before any second one."""
    return sorted(cores, key=lambda core: (sorted(core.siblings).index(core.number), -core.speed, core.number))


def _chat(machine: Machine, wishes: Wishes, fast: list[Core], quota: float | None) -> tuple[list[Core], int]:
    """The chat worker's cores and its threads at best: one to a physical core, as two would share its units."""
    if wishes.chat_threads:
        enough = fast if wishes.chat_threads <= len(fast) else _fastest_first(machine.cores)
        return enough, wishes.chat_threads
    physical = len({core.siblings for core in fast})
    wanted = physical if physical > 1 else len(fast)
    return fast, max(1, wanted if quota is None else min(wanted, _sustained(quota)))


def _sustained(quota: float) -> int:
    """The threads that make most of a quota of so many cores.

    n threads compute together for quota / n of the time, then all stop. One more than there are whole cores therefore
    pays from about half a core on: measured with SmolLM2 on two cores, decode tokens/s with 1 and 2 threads: at 1.25
    cores 97 and 89, at 1.5 97 and 95-119, at 1.75 95 and 120-133.
    """
    return math.floor(quota + 0.5)


def _worker(
    cores: Sequence[Core], threads: int, quota: float | None, needed: int | None, *, weight: int, nice: int
) -> Bounds:
    return Bounds(
        cores=_numbers(cores),
        threads=threads,
        weight=weight,
        nice=nice,
        quota_cores=quota,
        memory_high=None if needed is None else _pages(needed * HIGH_FACTOR + HIGH_BYTES),
        memory_max=None if needed is None else _pages(needed * MAX_FACTOR + MAX_BYTES),
        tasks_max=SPARE_TASKS + TASKS_A_CORE * len(cores),
    )


def _pages(size: float) -> int:
    """Bytes in whole pages, whatever their size: the kernel would round them, and what it holds is compared."""
    return int(size) // LARGEST_PAGE_BYTES * LARGEST_PAGE_BYTES


def _numbers(cores: Sequence[Core]) -> tuple[int, ...]:
    return tuple(sorted(core.number for core in cores))
