"""The top of the ladder: our programs in the kernel count every event of the watched processes.

They add up in maps; once a second the difference to the last reading is taken. What a thread is still doing (it may
compute, or sleep, for minutes) counts up to the moment of the reading.
"""

import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from edged.errors import ProbeError
from edged.probe import bpf
from edged.probe.layout import (
    CHANGE,
    CHECKED,
    NUMBER,
    RUNS,
    SLOTS,
    THREAD,
    THREADS,
    USAGE,
    Column,
    State,
)
from edged.probe.loading import Programs
from edged.probe.procfs import nanoseconds_of, thread_numbers, threads_now
from edged.probe.sample import AffinityChange

TRACEPOINTS: Final = (
    ("on_switch", "sched_switch"),
    ("on_wakeup", "sched_wakeup"),
    ("on_new", "sched_wakeup_new"),
    ("on_migration", "sched_migrate_task"),
    ("on_call_end", "sys_exit"),
    ("on_submit", "block_bio_queue"),
    ("on_submit", "block_split"),
    ("on_issue", "block_rq_issue"),
    ("on_complete", "block_rq_complete"),
)
CHECK: Final = ("sched_switch", "check_layout")
STATS_ENABLED: Final = Path("/proc/sys/kernel/bpf_stats_enabled")
SECONDS_PER_RUN: Final = 200e-9
"""Of one program: an estimate, where the kernel does not measure it."""
LOOKS: Final = 3
LONGEST_TICK: Final = 10_000_000
"""Nanoseconds, at 100 Hz. Where it is stopped (``nohz_full``), time is told as stolen that is found again later."""
STATES: Final = {"R": State.RUNNING, "D": State.WAITING}
"""As proc(5) has them; all others sleep, one way or another."""
REASONS: Final = {
    Column.RUNNABLE: "preempted",
    Column.SLEEPING: "sleeping",
    Column.WAITING: "waiting",
    Column.STOLEN: "stolen",
}
FIRST: Final = NUMBER.pack(0)


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What one process did between two readings, as :class:`~edged.probe.sample.ProcessSample` has it."""

    cpu_seconds: dict[int, float]
    off_cpu_seconds: dict[str, float]
    run_queue: tuple[int, ...]
    migrations: int
    affinity_changes: tuple[AffinityChange, ...]
    read_bytes: int
    written_bytes: int
    io_delay: tuple[int, ...]


class Reading(msgspec.Struct, frozen=True):
    """Of each watched process by its number; ``own_seconds`` is what the programs themselves took."""

    processes: dict[int, Counted]
    own_seconds: float


class _Total(msgspec.Struct):
    """Of one slot so far: nanoseconds on each core, and the sums over all cores of what ``USAGE`` holds."""

    on_cpu: list[int]
    columns: list[int]

    def add_run(self, core: int, passed: int, ran: int) -> None:
        """Of a thread that is on its core still: nanoseconds that passed, and how many of them it computed."""
        self.on_cpu[core] += ran
        self.columns[Column.STOLEN] += passed - ran

    def add_pause(self, state: int, passed: int) -> None:
        """Of a thread that is off it still."""
        self.columns[Column.RUNNABLE + state - State.RUNNABLE] += passed


class KernelProbe:
    """Counts from :meth:`watch` on, and tells what it counted by :meth:`read`. Raises ``OSError`` where the kernel
    refuses what it allowed before."""

    def __init__(self, programs: Programs) -> None:
        """Takes the programs over. Raises :class:`ProbeError` when they do not fit this kernel."""
        self._programs = programs
        self._maps = programs.maps
        self._attached: list[int] = []
        self._slots: dict[int, int] = {}
        self._before: dict[int, _Total] = {}
        self._untold: dict[int, tuple[AffinityChange, ...]] = {}
        self._own_before = 0.0
        try:
            self._check_layout()
        except (ProbeError, OSError):
            self.close()
            raise

    def watch(self, pids: Iterable[int]) -> None:
        """Count for these processes and no others; beyond :data:`SLOTS` of them the last ones are left out."""
        wanted = list(dict.fromkeys(pids))[:SLOTS]
        for pid in [pid for pid in self._slots if pid not in wanted]:
            self._maps["watched"].delete(NUMBER.pack(pid))
            del self._before[self._slots.pop(pid)]
        # Nothing of theirs is left for whoever gets their slot next.
        self._look()
        self._untold = {slot: made for slot, made in self._changes().items() if slot in self._before}
        if wanted and not self._attached:
            self._attach()
        begun = [pid for pid in wanted if pid not in self._slots]
        for pid in begun:
            self._begin(pid)
        totals = self._look()
        self._before.update({self._slots[pid]: totals[self._slots[pid]] for pid in begun})
        if not wanted:
            self._detach()

    def read(self) -> Reading:
        """What was counted since the last reading."""
        totals = self._look()
        changes, self._untold = self._changes(), {}
        processes = {}
        for pid, slot in self._slots.items():
            processes[pid] = _counted(self._before[slot], totals[slot], changes.get(slot, ()))
            self._before[slot] = totals[slot]
        own = self._own_seconds()
        passed, self._own_before = max(0.0, own - self._own_before), own
        return Reading(processes, passed)

    def close(self) -> None:
        """Let the kernel free everything."""
        self._detach()
        self._programs.close()

    # --- what runs when ------------------------------------------------------------------------------

    def _check_layout(self) -> None:
        """Our own switches show whether the programs find a task's number where they look for it."""
        tracepoint, program = CHECK
        descriptor = bpf.attach(tracepoint, self._programs.programs[program])
        try:
            time.sleep(0.001)  # the core is given to somebody else, and back
        finally:
            os.close(descriptor)
        right, wrong = (sum(each) for each in zip(*self._of_cores("checked", CHECKED), strict=True))
        if wrong or not right:
            raise ProbeError("the kernel headers are of another kernel, and this one has no BTF to correct them")

    def _attach(self) -> None:
        for program, tracepoint in TRACEPOINTS:
            self._attached.append(bpf.attach(tracepoint, self._programs.programs[program]))

    def _detach(self) -> None:
        for descriptor in self._attached:
            os.close(descriptor)
        self._attached.clear()

    def _begin(self, pid: int) -> None:
        """From here on the programs follow its new threads; those it has are made known, and what they do now."""
        slot = min(set(range(SLOTS)) - set(self._slots.values()))
        self._slots[pid] = slot
        self._maps["watched"].update(NUMBER.pack(pid), NUMBER.pack(slot))
        threads, unknown = self._maps["threads"], THREAD.pack(0, 0, slot, State.UNKNOWN, 0)
        known = thread_numbers(pid)
        for thread in known:
            threads.update(NUMBER.pack(thread), unknown, bpf.ONLY_NEW)
        alive = {now.number: now for now in threads_now(pid) if now.state not in "ZX"}
        for thread in known:
            key, now = NUMBER.pack(thread), alive.get(thread)
            if now is None:  # it may have ended before it was known, and nobody would forget it
                threads.delete(key)
            elif not now.cpu_nanoseconds:  # without its account so far, counting begins at its next switch
                continue
            elif threads.lookup(key) == unknown:  # else it has moved meanwhile, and the programs know better
                state = STATES.get(now.state, State.SLEEPING)
                threads.update(key, THREAD.pack(time.monotonic_ns(), now.cpu_nanoseconds, slot, state, now.core))

    # --- what was counted ----------------------------------------------------------------------------

    def _look(self) -> dict[int, _Total]:
        """Of each slot in use. A thread that moves while we look would count twice or not at all, so we look again;
        whoever moves that often has little to count."""
        for _ in range(LOOKS):
            threads = self._threads()
            totals = {slot: self._total(slot) for slot in self._slots.values()}
            ran_now = {key: nanoseconds_of(key) for key, (*_, state, _) in threads.items() if state == State.RUNNING}
            now = time.monotonic_ns()
            after = self._threads()
            if after == threads:
                break
        for key, (since, ran_then, slot, state, core) in threads.items():
            passed = max(0, now - since)
            if slot not in totals:
                self._maps["threads"].delete(NUMBER.pack(key))
            elif state == State.UNKNOWN or after.get(key) != threads[key]:
                continue
            elif state == State.RUNNING:
                totals[slot].add_run(core, passed, computed(passed, ran_then, ran_now[key]))
            else:
                totals[slot].add_pause(state, passed)
        return totals

    def _threads(self) -> dict[int, tuple[int, int, int, int, int]]:
        keys, values = self._maps["threads"].items(THREADS)
        numbers = (number for (number,) in NUMBER.iter_unpack(keys))
        return dict(zip(numbers, THREAD.iter_unpack(values), strict=True))

    def _total(self, slot: int) -> _Total:
        cores = self._of_cores("usage", USAGE, NUMBER.pack(slot))
        return _Total([core[Column.ON_CPU] for core in cores], [sum(column) for column in zip(*cores, strict=True)])

    def _changes(self) -> dict[int, tuple[AffinityChange, ...]]:
        found = dict(self._untold)
        for value in self._maps["changes"].take():
            caller, slot, thread, name = CHANGE.unpack(value)
            change = AffinityChange(
                caller_pid=caller, caller_name=name.partition(b"\0")[0].decode(errors="replace"), thread=thread
            )
            found[slot] = (*found.get(slot, ()), change)
        return found

    def _own_seconds(self) -> float:
        """As the kernel measures it where that is switched on, else by how often they ran."""
        if STATS_ENABLED.read_text(encoding="ascii").strip() == "1":
            return sum(bpf.run_seconds(program) for program in self._programs.programs.values())
        return sum(runs for (runs,) in self._of_cores("runs", RUNS)) * SECONDS_PER_RUN

    def _of_cores(self, name: str, form: struct.Struct, key: bytes = FIRST) -> list[tuple[int, ...]]:
        return list(form.iter_unpack(self._maps[name].lookup(key) or b""))


def computed(passed: int, then: int, now: int | None) -> int:
    """Nanoseconds that a thread computed of those that it was on its core, by an account that may be a tick late, or
    another task's that has its number by now."""
    told = passed if now is None else now - then
    return told if 0 <= told <= passed - LONGEST_TICK else passed


def _counted(before: _Total, after: _Total, changes: tuple[AffinityChange, ...]) -> Counted:
    """Never negative: a look that met a thread in the act may have been a little ahead."""
    columns = [max(0, new - old) for old, new in zip(before.columns, after.columns, strict=True)]
    on_cpu = (max(0, new - old) for old, new in zip(before.on_cpu, after.on_cpu, strict=True))
    return Counted(
        cpu_seconds={core: nanoseconds / 1e9 for core, nanoseconds in enumerate(on_cpu)},
        off_cpu_seconds={reason: columns[column] / 1e9 for column, reason in REASONS.items()},
        run_queue=tuple(columns[Column.RUN_QUEUE : Column.IO_DELAY]),
        migrations=columns[Column.MIGRATIONS],
        affinity_changes=changes,
        read_bytes=columns[Column.READ],
        written_bytes=columns[Column.WRITTEN],
        io_delay=tuple(columns[Column.IO_DELAY :]),
    )
