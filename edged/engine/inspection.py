"""A worker looked into from inside: memray records its allocations, and a tracer that the daemon names may read it."""

import ctypes
from typing import TYPE_CHECKING

from edged.workers.protocol import Inspect

if TYPE_CHECKING:
    import memray

PR_SET_PTRACER = 0x59616D61  # prctl(2)
HEAP_EVERY_MILLISECONDS = 100
_prctl = ctypes.CDLL(None).prctl


class InspectionError(RuntimeError):
    """What was asked for cannot be recorded here."""


class Inspection:
    """What is recorded of this process, and who may trace it; both nobody and nothing at first."""

    def __init__(self) -> None:
        self._tracker: memray.Tracker | None = None

    def use(self, request: Inspect) -> None:
        """Make it so. Raises :class:`InspectionError`; nothing has changed then."""
        if request.allocations:
            self._begin(request.allocations)
        else:
            self.close()
        # Kernels without Yama refuse: they ask nobody's leave.
        _prctl(PR_SET_PTRACER, ctypes.c_ulong(request.tracer), 0, 0, 0)

    def close(self) -> None:
        """End what is recorded; the file is whole then."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.__exit__(None, None, None)

    def _begin(self, path: str) -> None:
        if self._tracker is not None:
            raise InspectionError("the memory of this worker is being recorded already")
        try:
            import memray  # noqa: PLC0415 - takes its megabytes only when asked for
        except ImportError as error:
            raise InspectionError(f"memray cannot be used: {error}") from error
        try:
            # llama.cpp's own callers, and small Python objects, not only the arenas that hold them.
            tracker = memray.Tracker(
                path, native_traces=True, trace_python_allocators=True, memory_interval_ms=HEAP_EVERY_MILLISECONDS
            )
            tracker.__enter__()
        except (OSError, RuntimeError) as error:
            raise InspectionError(f"memray cannot record to {path}: {error}") from error
        self._tracker = tracker
