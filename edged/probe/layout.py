"""What lies in the programs' maps, byte for byte as programs/probe.h has it. Pure."""

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from edged.probe.sample import HISTOGRAM_BUCKETS

SLOTS: Final = 64
THREADS: Final = 4096

NUMBER: Final = struct.Struct("=I")
THREAD: Final = struct.Struct("=QQIII4x")
"""Since when (ns), how long it had run until then (ns), slot, state, core."""
USAGE: Final = struct.Struct(f"={8 + 2 * HISTOGRAM_BUCKETS}Q")
RUNS: Final = struct.Struct("=Q")
LAYOUT: Final = struct.Struct("=IIIIIIQQ")
CHANGE: Final = struct.Struct("=III4x16s")
"""Caller, slot, thread, the caller's name."""
CHECKED: Final = struct.Struct("=QQ")

FIELDS: Final = (
    (("task_struct", "pid"),),
    (("task_struct", "tgid"),),
    (("task_struct", "se"), ("sched_entity", "sum_exec_runtime")),
    (("request", "bio"),),
    (("request", "cmd_flags"),),
    (("bio", "bi_iter"), ("bvec_iter", "bi_size")),
)
"""Whose places ``LAYOUT`` begins with, each from the structure inwards; the device and inode of our pid namespace
follow."""

VALUES: Final[Mapping[str, struct.Struct]] = {
    "layout": LAYOUT,
    "watched": NUMBER,
    "threads": THREAD,
    "usage": USAGE,
    "runs": RUNS,
    "checked": CHECKED,
    "changes": CHANGE,
}
"""The maps that are read or written from here; the others are the programs' own."""
KEYLESS: Final = frozenset({"changes"})
OF_EACH_CORE: Final = frozenset({"usage", "runs", "checked"})


class State(IntEnum):
    """What a thread does."""

    UNKNOWN = 0
    RUNNING = 1
    RUNNABLE = 2
    SLEEPING = 3
    WAITING = 4


class Column(IntEnum):
    """Where what stands in ``USAGE``. Times of the states that follow each other follow each other too."""

    ON_CPU = 0
    RUNNABLE = 1
    SLEEPING = 2
    WAITING = 3
    STOLEN = 4
    MIGRATIONS = 5
    READ = 6
    WRITTEN = 7
    RUN_QUEUE = 8
    IO_DELAY = RUN_QUEUE + HISTOGRAM_BUCKETS
