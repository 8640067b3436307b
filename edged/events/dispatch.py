"""From an open event to its one outcome: takes the most urgent, has it answered, closes it."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import msgspec
import structlog

from edged.errors import DiskFullError, EdgedError, ExpiredError, RequestError, StoreError
from edged.events.event import Event, Outcome
from edged.events.inbox import Inbox
from edged.runtime.health import STORE_FAILING, Health
from edged.types import Answer, AnswerEvent, Delta, Question, Restarted

STORE_PAUSE_SECONDS = 1.0
DEFECT_PAUSE_SECONDS = 1.0


class Answers(Protocol):
    """Whoever answers questions."""

    def stream(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        """Ends with exactly one :class:`Answer`."""


class Rendering(Protocol):
    """How answers and errors look to the sender of an event."""

    def answer(self, event: Event, answer: Answer) -> bytes:
        """The message of a finished answer."""

    def error(self, event: Event, error: EdgedError) -> bytes:
        """The message of an event that got none."""


class Dispatcher:
    """Works on up to ``concurrency`` events at a time. :meth:`run` is one supervised service.

    While ``shedding`` says so, batch events stay open and wait; :meth:`wake` when that ends.
    """

    def __init__(
        self,
        inbox: Inbox,
        answers: Answers,
        rendering: Rendering,
        health: Health,
        *,
        decide: Callable[[Event], Question],
        concurrency: int,
        shedding: Callable[[], bool] = lambda: False,
        on_closed: Callable[[Event, Outcome, float], None] = lambda _event, _outcome, _seconds: None,
        on_progress: Callable[[Event, Delta | Restarted], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._inbox = inbox
        self._answers = answers
        self._rendering = rendering
        self._health = health
        self._decide = decide
        self._concurrency = concurrency
        self._shedding = shedding
        self._on_closed = on_closed
        self._on_progress = on_progress
        self._clock = clock
        self._working: dict[str, asyncio.Task[None]] = {}
        self._deferred: set[str] = set()
        self._wake = asyncio.Event()
        self._log = structlog.get_logger("dispatch")

    @property
    def working(self) -> int:
        """Events being answered now."""
        return len(self._working)

    def wake(self) -> None:
        """There may be a new event, or room for another."""
        self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled; events left open then are taken up at the next start."""
        self._wake.set()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._take()
        finally:
            tasks = list(self._working.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self) -> None:
        free = self._concurrency - len(self._working)
        if free <= 0:
            return
        if not self._shedding():
            self._deferred.clear()
        for event in await self._inbox.open_events(free, leave_out=[*self._working, *self._deferred]):
            if self._defers(event):
                self._deferred.add(event.id)
                self.wake()  # its place is another's
                continue
            task = asyncio.create_task(self._handle(event), name=f"event-{event.id}")
            self._working[event.id] = task
            task.add_done_callback(functools.partial(self._done, event.id))

    def _defers(self, event: Event) -> bool:
        """Whether an event waits until the device takes work of its class again; one that expired need not."""
        if not self._shedding() or (event.expires_at is not None and self._clock() >= event.expires_at):
            return False
        try:
            return self._decide(event).priority == "batch"
        except RequestError:
            return False

    def _done(self, event_id: str, task: asyncio.Task[None]) -> None:
        self._working.pop(event_id, None)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("event_not_closed", event_id=event_id, error=str(task.exception()))
            asyncio.get_running_loop().call_later(DEFECT_PAUSE_SECONDS, self.wake)  # still open: it is taken again
            return
        self.wake()

    async def _handle(self, event: Event) -> None:
        outcome, body = await self._outcome(event)
        if await self._close(event, outcome, body):
            seconds = self._clock() - event.received_at
            self._on_closed(event, outcome, seconds)
            self._log.info(
                "event_closed", event_id=event.id, topic=event.topic, outcome=outcome.value, seconds=round(seconds, 4)
            )

    async def _close(self, event: Event, outcome: Outcome, body: bytes) -> bool:
        """Store the outcome. While the store cannot, the answer is kept rather than made again."""
        while True:
            try:
                closed = await self._inbox.close_event(event.id, outcome, body)
            except (StoreError, DiskFullError) as error:
                self._health.set(STORE_FAILING, f"an outcome could not be stored: {error.message}")
                await asyncio.sleep(STORE_PAUSE_SECONDS)
            else:
                self._health.clear(STORE_FAILING)
                return closed

    async def _outcome(self, event: Event) -> tuple[Outcome, bytes]:
        now = self._clock()
        if event.expires_at is not None and now >= event.expires_at:
            late = now - event.expires_at
            error = ExpiredError(
                f"the event expired {late:.1f} s before its turn", hint="raise expires_s, or send fewer events"
            )
            return Outcome.EXPIRED, self._rendering.error(event, error)
        try:
            answer = await self._answer(event, self._with_deadline(self._decide(event), event, now))
        except RequestError as error:
            return Outcome.REJECTED, self._rendering.error(event, error)
        except EdgedError as error:
            return Outcome.FAILED, self._rendering.error(event, error)
        except Exception as error:  # noqa: BLE001 - one event's defect must not block all the others behind it
            self._log.exception("event_failed", event_id=event.id)
            internal = EdgedError(f"answering failed: {type(error).__name__}", hint="see the daemon's log")
            return Outcome.FAILED, self._rendering.error(event, internal)
        return Outcome.ANSWERED, self._rendering.answer(event, answer)

    async def _answer(self, event: Event, question: Question) -> Answer:
        async with contextlib.aclosing(self._answers.stream(question)) as stream:
            async for item in stream:
                if isinstance(item, Answer):
                    return item
                if self._on_progress is not None:
                    self._on_progress(event, item)
        raise EdgedError("the answer ended without a result")

    def _with_deadline(self, question: Question, event: Event, now: float) -> Question:
        """Whichever ends first: the time to answer by, or the time after which nobody wants the answer."""
        ends = [end for end in (event.answer_by, event.expires_at) if end is not None]
        if not ends:
            return question
        return msgspec.structs.replace(question, deadline_seconds=max(0.0, min(ends) - now))
