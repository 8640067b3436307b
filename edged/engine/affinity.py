"""Gives each computing thread a core of its own, where there are as many cores as such threads.

Threads that wait for each other sleep and wake up all the time. Beside a busy process the kernel then puts two of them
on one core and leaves that process the other, for seconds: sched(7) knows no group of threads that is good only
together.
"""

import contextlib
import os
import threading
from pathlib import Path

TASKS = Path("/proc/self/task")

Cores = frozenset[int]


class ThreadCores:
    """Of this process, whose main thread computes. What others allow it is never exceeded: their change is seen."""

    def __init__(self) -> None:
        self._allowed = self._main = _cores_of(0)
        self._decided = (0, 0)

    def keep(self, threads: int) -> None:
        """Call it after each step, computed with so many ``threads``: they exist then, and may have been moved."""
        facts = (threads, TASKS.stat().st_nlink)
        if _cores_of(0) == self._main and facts == self._decided:
            return
        team, allowed = _team(), self._look()
        apart = len(team) == threads == len(allowed)
        self._place(team, [frozenset({core}) for core in sorted(allowed)] if apart else [allowed] * len(team))
        self._decided = facts

    def release(self) -> None:
        """Let all move, until :meth:`keep` is called again."""
        team = _team()
        self._place(team, [self._look()] * len(team))
        self._decided = (0, 0)

    def _look(self) -> Cores:
        """What others allow."""
        main = _cores_of(0)
        if main != self._main:
            self._allowed = main
        return self._allowed

    def _place(self, team: list[int], places: list[Cores]) -> None:
        for thread, cores in zip(team, places, strict=True):
            with contextlib.suppress(OSError):  # it ended, or they were taken away just now
                if _cores_of(thread) != cores:
                    os.sched_setaffinity(thread, cores)
        self._main = places[-1]  # as it was set and not as it is: others may have changed it since


def _team() -> list[int]:
    """The threads that llama.cpp computes with, the main thread last; Python's others only wait."""
    waiting = {each.native_id for each in threading.enumerate()}
    return [*sorted({int(task.name) for task in TASKS.iterdir()} - waiting), os.getpid()]


def _cores_of(thread: int) -> Cores:
    return frozenset(os.sched_getaffinity(thread))
