"""How many events may be open: beyond the limit nothing is accepted, and the broker keeps what comes."""

import asyncio

from edged.runtime.health import INBOX_FULL, Health


class Admission:
    """Counts open events against a limit."""

    def __init__(self, health: Health, *, limit: int, open_events: int) -> None:
        self._health = health
        self._limit = limit
        self._open = open_events
        self._room = asyncio.Event()
        self._update()

    @property
    def is_full(self) -> bool:
        return self._open >= self._limit

    @property
    def open_events(self) -> int:
        return self._open

    async def room(self) -> None:
        """Return once another event may be accepted."""
        await self._room.wait()

    def use_limit(self, limit: int) -> None:
        """From now on; what is open already stays."""
        self._limit = limit
        self._update()

    def opened(self) -> None:
        self._open += 1
        self._update()

    def closed(self) -> None:
        self._open -= 1
        self._update()

    def _update(self) -> None:
        if self.is_full:
            self._room.clear()
            self._health.set(INBOX_FULL, f"{self._limit} events are open")
        else:
            self._room.set()
            self._health.clear(INBOX_FULL)
