"""Workers looked into for as long as somebody asks; what memray records of one is there until that somebody is gone."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from edged.errors import InspectionBusyError, WorkerError, WorkerLostError, WorkerUnavailableError
from edged.models.rollout import Role
from edged.workers.worker import Worker


class Inspection:
    """One process of a worker, ``pid``, whose ``allocations`` are being written to a file."""

    def __init__(self, worker: Worker, pid: int, allocations: Path) -> None:
        self.pid = pid
        self.allocations = allocations
        self._worker = worker

    async def end(self) -> None:
        """Make the file whole. Raises :class:`WorkerError`: the process is not the one of the beginning any more."""
        await self._worker.inspect()
        if self._worker.pid != self.pid:
            raise WorkerLostError(f"the {self._worker.settings.kind} worker's process ended while it was looked into")


class Inspections:
    """One at a time for each role. ``worker`` is who serves a role now; files go to ``folder``."""

    def __init__(self, worker: Callable[[Role], Worker | None], folder: Path) -> None:
        self._worker = worker
        self._folder = folder
        self._busy: set[Role] = set()

    @contextlib.asynccontextmanager
    async def begin(self, role: Role, *, tracer: int) -> AsyncGenerator[Inspection, None]:
        """Record the worker's allocations, and let the process ``tracer`` trace it, for the time of the block.

        Raises :class:`WorkerError`: somebody else does, memray is missing, there is no process.
        """
        if role in self._busy:
            raise InspectionBusyError(f"the {role} worker is being looked into already")
        worker = self._worker(role)
        pid = worker.pid if worker is not None else None
        if worker is None or pid is None:
            raise WorkerUnavailableError(f"the {role} worker has no process now", hint="ask it something first")
        allocations = self._folder / f"allocations-{role}.memray"
        self._busy.add(role)
        try:
            await asyncio.to_thread(allocations.unlink, missing_ok=True)  # left over by a daemon that was killed
            await worker.inspect(allocations=allocations, tracer=tracer)
            yield Inspection(worker, pid, allocations)
        finally:
            # Also where it was refused or cut off: the worker may have begun without our hearing of it.
            with contextlib.suppress(WorkerError):
                await worker.inspect()
            await asyncio.to_thread(allocations.unlink, missing_ok=True)
            self._busy.discard(role)
