"""Every long-lived task has an owner, a name and an end; the restart policy lives here and nowhere else."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

import structlog

from edged.runtime.backoff import pause_seconds
from edged.runtime.health import SERVICE_FAILING, Health

SMALLEST_PAUSE_SECONDS = 0.2
LARGEST_PAUSE_SECONDS = 30.0
STABLE_AFTER_SECONDS = 60.0


class Supervisor:
    """Runs named services, each until it returns or the supervisor stops; one that raises is run again.

    ``health`` names those that raised twice in a row, and why, until they have run for a while.
    """

    def __init__(self, health: Health) -> None:
        self._health = health
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._causes: dict[str, str] = {}
        self._log = structlog.get_logger("supervise")

    def start(self, name: str, service: Callable[[], Awaitable[None]]) -> None:
        """Run ``service`` under ``name``; a second service of the same name is a programming error."""
        if name in self._tasks and not self._tasks[name].done():
            raise ValueError(f"service {name} runs already")
        self._tasks[name] = asyncio.create_task(self._run(name, service), name=name)

    async def stop(self, name: str) -> None:
        """Cancel one service and wait for its end; unknown names are fine."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop_all(self) -> None:
        """Cancel every service, the youngest first."""
        for name in reversed(list(self._tasks)):
            await self.stop(name)

    async def _run(self, name: str, service: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            stable = asyncio.get_running_loop().call_later(STABLE_AFTER_SECONDS, self._set_cause, name, None)
            try:
                await service()
            except Exception as error:  # noqa: BLE001 - whatever it was, the others go on and this one starts again
                failures = 1 if time.monotonic() - started > STABLE_AFTER_SECONDS else failures + 1
                self._log.exception("service_failed", service=name, failures=failures)
                if failures > 1:
                    self._set_cause(name, f"{name}: {type(error).__name__}: {error}")
            else:
                self._set_cause(name, None)
                return
            finally:
                stable.cancel()
            await asyncio.sleep(
                pause_seconds(
                    failures,
                    smallest=SMALLEST_PAUSE_SECONDS,
                    largest=LARGEST_PAUSE_SECONDS,
                    random=random.random(),  # noqa: S311 - jitter, no secret
                )
            )

    def _set_cause(self, name: str, cause: str | None) -> None:
        """Say why a service is not running as it should; None: it is."""
        if cause is not None:
            self._causes[name] = cause
        else:
            self._causes.pop(name, None)
        if self._causes:
            self._health.set(SERVICE_FAILING, "; ".join(self._causes.values()))
        else:
            self._health.clear(SERVICE_FAILING)
