"""The processor's own counters, of a process and all its threads: perf_event_open(2)."""

import contextlib
import ctypes
import os
import platform
import struct
from collections.abc import Mapping
from typing import Final

import msgspec

from edged.probe.procfs import thread_numbers

CALL_NUMBERS: Final = {"x86_64": 298, "aarch64": 241}
"""Of perf_event_open(2), by ``uname -m``."""

HARDWARE, SOFTWARE = 0, 1
EVENTS: Final[Mapping[str, tuple[int, int]]] = {
    "cycles": (HARDWARE, 0),
    "instructions": (HARDWARE, 1),
    "cache_misses": (HARDWARE, 3),
    "migrations": (SOFTWARE, 4),
}
"""By what they count: type and config. ``cache_misses`` are those of the last level."""

# type, size, config, period, sample type, read format (times enabled and running), flags, the rest
ATTRIBUTES: Final = struct.Struct("=IIQQQQQ80x")
TIMES: Final = 0b11
INHERIT, EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR, ONLY_THREADS = 1 << 1, 1 << 5, 1 << 6, 1 << 35
CLOSE_ON_EXEC: Final = 8
VALUE: Final = struct.Struct("=QQQ")

_libc = ctypes.CDLL(None, use_errno=True)


class Count(msgspec.Struct, frozen=True):
    """So many events; ``share`` of the time in which they were counted, when there are fewer counters than events."""

    value: int
    share: float


def open_counter(event: str, thread: int, *, kernel: bool) -> int:
    """A descriptor that counts for a thread and all threads that it will make. Raises ``OSError``.

    Without ``kernel`` only what happens outside of it counts, for which fewer rights are needed.
    """
    kind, config = EVENTS[event]
    flags = INHERIT | ONLY_THREADS | (0 if kernel else EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR)
    attributes = ATTRIBUTES.pack(kind, ATTRIBUTES.size, config, 0, 0, TIMES, flags)
    descriptor: int = _libc.syscall(
        CALL_NUMBERS[platform.machine()], attributes, thread, -1, -1, ctypes.c_ulong(CLOSE_ON_EXEC)
    )
    if descriptor < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return descriptor


def available() -> dict[str, bool]:
    """The events that can be counted here, and whether also inside the kernel, where alone migrations happen."""
    found = {}
    for event in EVENTS if platform.machine() in CALL_NUMBERS else ():
        for kernel in (True,) if event == "migrations" else (True, False):
            with contextlib.suppress(OSError):  # no such counter, no such right, or a kernel before 5.13
                os.close(open_counter(event, 0, kernel=kernel))
                found[event] = kernel
                break
    return found


class Counters:
    """The counters of one process from now on. Threads that it makes while they are opened may be missed."""

    def __init__(self, pid: int, events: Mapping[str, bool]) -> None:
        self._opened: dict[str, list[int]] = {event: [] for event in events}
        self._before = dict.fromkeys(events, (0, 0, 0))
        try:
            for thread in thread_numbers(pid):
                for event, kernel in events.items():
                    self._open(event, thread, kernel=kernel)
        except OSError:
            self.close()  # without rights or descriptors for all of it there is none of it
            self._opened = {}

    def read(self) -> dict[str, Count]:
        """What was counted since the last reading."""
        found = {}
        for event, descriptors in self._opened.items():
            each = (VALUE.unpack(os.read(descriptor, VALUE.size)) for descriptor in descriptors)
            now = tuple(sum(column) for column in zip(*each, strict=True)) or (0, 0, 0)
            value, enabled, running = (new - old for new, old in zip(now, self._before[event], strict=True))
            self._before[event] = (now[0], now[1], now[2])
            share = running / enabled if enabled else 1.0
            if share > 0:
                found[event] = Count(round(value / share), share)
        return found

    def close(self) -> None:
        for descriptors in self._opened.values():
            for descriptor in descriptors:
                os.close(descriptor)
            descriptors.clear()

    def _open(self, event: str, thread: int, *, kernel: bool) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            self._opened[event].append(open_counter(event, thread, kernel=kernel))
