"""Closed events and their answers are kept for a time and up to a size, answers that the broker refuses for a time."""

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from edged.config import Events
from edged.events.inbox import Inbox
from edged.events.outbox import Outbox

EVERY_SECONDS = 3600.0
SECONDS_A_DAY = 86_400.0


class Retention:
    """Forgets what is beyond ``keep_days`` or ``keep_bytes``, each hour and whenever they change.

    :meth:`run` is one supervised service; ``on_gone`` is called after something went.
    """

    def __init__(self, inbox: Inbox, outbox: Outbox, settings: Events, on_gone: Callable[[], None]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._settings = settings
        self._on_gone = on_gone
        self._changed = asyncio.Event()

    def use(self, settings: Events) -> None:
        """From now on: a full disk does not wait for the next hour."""
        self._settings = settings
        self._changed.set()

    async def run(self) -> None:
        """Forget and wait, until cancelled. Raises :class:`StoreError`."""
        while True:
            self._changed.clear()
            keep = self._settings
            before = time.time() - keep.keep_days * SECONDS_A_DAY
            await self._outbox.give_up(before)
            gone = await self._inbox.prune(closed_before=before, keep_bytes=keep.keep_bytes)
            if gone:
                structlog.get_logger("retention").info("events_pruned", events=gone)
                self._on_gone()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout=EVERY_SECONDS)
