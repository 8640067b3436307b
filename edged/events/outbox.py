"""Publishes stored answers until the broker acknowledges each: at least once, in order per topic.

What the broker refuses is left behind, and tried again one by one beside the others: however much of it there is, it
holds up nobody.
"""

import asyncio
from typing import Protocol

import structlog

from edged.errors import DiskFullError, StoreError
from edged.events.event import Outgoing
from edged.events.inbox import Inbox
from edged.runtime.health import MQTT_REFUSED, STORE_FAILING, Health

STORE_PAUSE_SECONDS = 1.0
REFUSED_PAUSE_SECONDS = 60.0
RETRIES_A_ROUND = 512
SHOWN_TOPICS = 5


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
        self._offered = 0  # up to this seq all were sent: what is still stored and not in flight was refused
        self._retrying: int | None = None
        self._retried = 0  # up to this seq the refused ones had their turn
        self._turns = 0  # how many of them may be refused again before the next pause
        self._refusals = 0
        self._pause: asyncio.TimerHandle | None = None
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
                if not (await self._send_next() or await self._retry_next()):
                    await self._wake.wait()
        finally:
            tasks = list(self._in_flight.values())
            if self._pause is not None:
                self._pause.cancel()
            self._offered, self._retried, self._turns, self._pause = 0, 0, 0, None
            self._health.clear(MQTT_REFUSED)  # the next start offers all of it again
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def give_up(self, created_before: float) -> None:
        """Forget what the broker has refused ever since a Unix time."""
        topics = await self._inbox.give_up(
            created_before=created_before, until=self._offered, leave_out=list(self._in_flight)
        )
        if topics:
            shown = list(dict.fromkeys(topics))[:SHOWN_TOPICS]
            self._log.warning("refused_answers_given_up", answers=len(topics), topics=shown)

    async def _send_next(self) -> bool:
        """Start publishing what was not offered yet; False when there is nothing or no room."""
        room = self._window - len(self._in_flight)
        if room <= 0:
            return False
        offered = self._offered
        messages = await self._inbox.outgoing(room, after=offered, leave_out=self._in_flight)
        if self._offered != offered:  # a connection has ended meanwhile: it goes on from there
            return True
        for message in messages:
            self._offered = message.seq
            self._start(message)
        return bool(messages)

    async def _retry_next(self) -> bool:
        """Try the next one of the refused again, where one is due; False when there is none or no room."""
        if self._turns <= 0 or self._retrying is not None or len(self._in_flight) >= self._window:
            return False
        refused = await self._inbox.outgoing(1, after=self._retried, until=self._offered, leave_out=self._in_flight)
        if not refused:
            await self._end_round()
            return False
        if refused[0].seq <= self._offered:  # else it is sent with those that were cut off
            self._retrying = self._retried = refused[0].seq
            self._start(refused[0])
        return True

    async def _end_round(self) -> None:
        """Each of the refused had its turn: now none is left, or the next round comes later."""
        self._turns = self._retried = 0
        refusals = self._refusals
        left = await self._inbox.outgoing(1, until=self._offered, leave_out=self._in_flight)
        if left or self._refusals != refusals:
            self._rest()
        else:
            self._health.clear(MQTT_REFUSED)

    def _start(self, message: Outgoing) -> None:
        self._in_flight[message.seq] = asyncio.create_task(self._send(message), name=f"publish-{message.seq}")

    async def _send(self, message: Outgoing) -> None:
        try:
            await self._publisher.publish(message)
        except DisconnectedError:
            if message.seq != self._retrying:  # what follows it was cut off too, or comes once more
                self._offered = min(self._offered, message.seq - 1)
        except PublishRefusedError as refusal:
            self._refuse(message, str(refusal))
        else:
            await self._record(message.seq)
        finally:
            self._in_flight.pop(message.seq, None)
            if self._retrying == message.seq:
                self._retrying = None
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
        """Leave a message behind, so that it neither is lost nor holds up the others."""
        if not self._health.holds(MQTT_REFUSED):  # the first one is named: each change of the text is told to everybody
            self._health.set(MQTT_REFUSED, f"the broker refused a message to {message.topic}: {why}")
        self._refusals += 1
        if message.seq == self._retrying:
            self._turns -= 1
        self._rest()

    def _rest(self) -> None:
        """Begin the next round after a pause, unless one goes on."""
        if self._turns <= 0 and self._pause is None:
            self._pause = asyncio.get_running_loop().call_later(REFUSED_PAUSE_SECONDS, self._begin_round)

    def _begin_round(self) -> None:
        self._turns, self._pause = RETRIES_A_ROUND, None
        self.wake()
