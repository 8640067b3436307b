"""Publishes stored answers until the broker acknowledges each: at least once, in order per topic."""

import asyncio
from typing import Protocol

import structlog

from edged.errors import DiskFullError, StoreError
from edged.events.event import Outgoing
from edged.events.inbox import Inbox
from edged.runtime.health import MQTT_REFUSED, STORE_FAILING, Health

STORE_PAUSE_SECONDS = 1.0
REFUSED_PAUSE_SECONDS = 60.0
MOST_REFUSED = 512


class PublishRefusedError(Exception):
    """The broker answered that it will not take the message."""


class DisconnectedError(Exception):
    """The connection ended before the broker acknowledged; the message may or may not have arrived."""


class Publisher(Protocol):
    """A connection to a broker."""

    async def connected(self) -> None:
        """Return once there is a connection."""

    async def publish(self, message: Outgoing) -> None:
        """Return once acknowledged. Raises :class:`PublishRefusedError` or :class:`DisconnectedError`."""


class Outbox:
    """Keeps up to ``window`` messages in flight. :meth:`run` is one supervised service."""

    def __init__(self, inbox: Inbox, publisher: Publisher, health: Health, *, window: int) -> None:
        self._inbox = inbox
        self._publisher = publisher
        self._health = health
        self._window = window
        self._in_flight: dict[int, asyncio.Task[None]] = {}
        self._refused: dict[int, asyncio.TimerHandle] = {}
        self._wake = asyncio.Event()
        self._log = structlog.get_logger("outbox")

    def wake(self) -> None:
        """There may be a new message."""
        self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled; what was not acknowledged by then is sent again after the next start."""
        try:
            while True:
                await self._publisher.connected()
                self._wake.clear()
                if not await self._send_next():
                    await self._wake.wait()
        finally:
            tasks = list(self._in_flight.values())
            for pause in self._refused.values():
                pause.cancel()
            self._refused.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_next(self) -> bool:
        """Start publishing what follows the messages in flight; False when there is nothing or no room."""
        room = self._window - len(self._in_flight)
        if room <= 0 or len(self._refused) >= MOST_REFUSED:
            return False
        messages = await self._inbox.outgoing(room, leave_out=[*self._in_flight, *self._refused])
        for message in messages:
            task = asyncio.create_task(self._send(message), name=f"publish-{message.seq}")
            self._in_flight[message.seq] = task
        return bool(messages)

    async def _send(self, message: Outgoing) -> None:
        try:
            await self._publisher.publish(message)
        except DisconnectedError:
            return  # still in the table; it goes out again on the next connection
        except PublishRefusedError as refusal:
            self._refuse(message, str(refusal))
        else:
            if not self._refused:
                self._health.clear(MQTT_REFUSED)
            await self._record(message.seq)
        finally:
            self._in_flight.pop(message.seq, None)
            self.wake()

    async def _record(self, seq: int) -> None:
        """Note that a message was acknowledged. While the store cannot, it waits here and is not sent again."""
        failed = False
        while True:
            try:
                await self._inbox.published(seq)
            except (StoreError, DiskFullError) as error:
                self._health.set(STORE_FAILING, f"a published answer could not be recorded: {error.message}")
                failed = True
                await asyncio.sleep(STORE_PAUSE_SECONDS)
            else:
                if failed:
                    self._health.clear(STORE_FAILING)
                return

    def _refuse(self, message: Outgoing, why: str) -> None:
        """Set a message aside for a while, so that it neither is lost nor holds up the others."""
        self._health.set(MQTT_REFUSED, f"the broker refused a message to {message.topic}: {why}")
        loop = asyncio.get_running_loop()
        self._refused[message.seq] = loop.call_later(REFUSED_PAUSE_SECONDS, self._try_again, message.seq)

    def _try_again(self, seq: int) -> None:
        self._refused.pop(seq, None)
        self.wake()
