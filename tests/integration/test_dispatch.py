"""From an open event to its one outcome, with answers that are slow, wrong, late or missing."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import pytest

from edged.errors import EdgedError, RequestError, StoreError
from edged.events import dispatch as dispatch_module
from edged.events.dispatch import Dispatcher
from edged.events.event import Event, Incoming, Outcome
from edged.events.inbox import Inbox
from edged.gateway.mqtt import Rendering
from edged.runtime.health import STORE_FAILING, Health
from edged.types import Answer, AnswerEvent, Delta, Question, Restarted, Timings

NOW = 1000.0


class Answers:
    """Answers by the words of the question."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.release = asyncio.Event()
        self.release.set()
        self.running = 0
        self.most = 0
        self.changed = asyncio.Event()

    async def until_running(self, count: int) -> None:
        while self.running < count:
            self.changed.clear()
            await self.changed.wait()

    async def stream(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        self.asked.append(question)
        self.running += 1
        self.most = max(self.most, self.running)
        self.changed.set()
        try:
            await self.release.wait()
            if question.text == "store fails":
                raise StoreError("the disk is gone")
            if question.text == "defect":
                raise ZeroDivisionError
            if question.text == "nothing":
                return
            yield Delta("4")
            yield Restarted("again")
            yield Answer(text="42", citations=(), step="generated", note="", model="m", timings=Timings())
        finally:
            self.running -= 1


class Setup:
    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self.answers = Answers()
        self.health = Health()
        self.closed: dict[str, Outcome] = {}
        self.progress: list[Delta | Restarted] = []
        self.all_closed = asyncio.Event()
        self.expected = 1
        self.shedding = False

    def on_closed(self, event: Event, outcome: Outcome, _seconds: float) -> None:
        assert event.id not in self.closed
        self.closed[event.id] = outcome
        if len(self.closed) >= self.expected:
            self.all_closed.set()

    def dispatcher(self, decide: Callable[[Event], Question] | None = None, concurrency: int = 2) -> Dispatcher:
        return Dispatcher(
            self.inbox,
            self.answers,
            Rendering(),
            self.health,
            decide=decide or (lambda event: Question(text=event.payload.decode())),
            concurrency=concurrency,
            shedding=lambda: self.shedding,
            on_closed=self.on_closed,
            on_progress=lambda _event, item: self.progress.append(item),
            clock=lambda: NOW,
        )

    async def accept(self, event_id: str, text: str, **changes: float) -> None:
        await self.inbox.accept(
            Incoming(
                id=event_id,
                source="test",
                topic="t",
                payload=text.encode(),
                reply_topic=None,
                reply_prefix="a",
                received_at=NOW,
                **changes,  # type: ignore[arg-type]
            )
        )

    async def body(self, event_id: str) -> dict[str, object]:
        stored = await self.inbox.answer(event_id)
        assert stored is not None
        body: dict[str, object] = json.loads(stored)
        return body


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    inbox = await Inbox.open(tmp_path / "events.db")
    yield Setup(inbox)
    await inbox.close()


@contextlib.asynccontextmanager
async def serving(dispatcher: Dispatcher) -> AsyncIterator[None]:
    task = asyncio.create_task(dispatcher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_event_is_answered_stored_and_queued_for_publishing(setup: Setup) -> None:
    await setup.accept("e1", "why?")
    async with serving(setup.dispatcher()):
        await setup.all_closed.wait()
    assert setup.closed == {"e1": Outcome.ANSWERED}
    body = await setup.body("e1")
    assert (body["id"], body["answer"], body["step"]) == ("e1", "42", "generated")
    assert body["answer_id"]
    assert len(await setup.inbox.outgoing(10)) == 1
    assert [type(item) for item in setup.progress] == [Delta, Restarted]


async def test_an_expired_event_is_closed_without_being_asked(setup: Setup) -> None:
    await setup.accept("e1", "why?", expires_at=NOW - 3.0)
    async with serving(setup.dispatcher()):
        await setup.all_closed.wait()
    assert setup.closed == {"e1": Outcome.EXPIRED}
    assert setup.answers.asked == []
    error = (await setup.body("e1"))["error"]
    assert isinstance(error, dict)
    assert (error["code"], error["message"]) == ("expired", "the event expired 3.0 s before its turn")


async def test_the_time_left_is_handed_on_whichever_limit_ends_first(setup: Setup) -> None:
    await setup.accept("e1", "why?", answer_by=NOW + 5.0, expires_at=NOW + 2.0)
    async with serving(setup.dispatcher()):
        await setup.all_closed.wait()
    assert setup.answers.asked[0].deadline_seconds == 2.0


@pytest.mark.parametrize(
    ("text", "outcome", "code"),
    [
        ("store fails", Outcome.FAILED, "store_error"),
        ("defect", Outcome.FAILED, "internal"),
        ("nothing", Outcome.FAILED, "internal"),
    ],
)
async def test_a_failing_answer_fails_its_own_event_alone(setup: Setup, text: str, outcome: Outcome, code: str) -> None:
    await setup.accept("bad", text)
    await setup.accept("good", "why?")
    setup.expected = 2
    async with serving(setup.dispatcher()):
        await setup.all_closed.wait()
    assert setup.closed == {"bad": outcome, "good": Outcome.ANSWERED}
    error = (await setup.body("bad"))["error"]
    assert isinstance(error, dict)
    assert error["code"] == code


async def test_an_event_that_asks_nothing_usable_is_rejected(setup: Setup) -> None:
    def decide(_event: Event) -> Question:
        raise RequestError("no question", hint="send one")

    await setup.accept("e1", "?")
    async with serving(setup.dispatcher(decide)):
        await setup.all_closed.wait()
    assert setup.closed == {"e1": Outcome.REJECTED}


async def test_no_more_events_are_worked_on_than_allowed(setup: Setup) -> None:
    setup.expected = 20
    for number in range(setup.expected):
        await setup.accept(f"e{number}", "why?")
    setup.answers.release.clear()
    async with serving(setup.dispatcher(concurrency=3)):
        await setup.answers.until_running(3)
        setup.answers.release.set()
        await setup.all_closed.wait()
    assert setup.answers.most == 3
    assert set(setup.closed.values()) == {Outcome.ANSWERED}


async def test_an_event_cut_off_by_a_stop_is_taken_up_at_the_next_start(setup: Setup) -> None:
    await setup.accept("e1", "why?")
    setup.answers.release.clear()
    first = setup.dispatcher()
    async with serving(first):
        await setup.answers.until_running(1)
    assert setup.closed == {}
    assert setup.answers.running == 0
    setup.answers.release.set()
    async with serving(setup.dispatcher()):
        await setup.all_closed.wait()
    assert setup.closed == {"e1": Outcome.ANSWERED}


async def test_an_outcome_the_store_does_not_take_is_a_condition_and_is_tried_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_event = setup.inbox.close_event
    failures = 2

    async def failing(event_id: str, outcome: Outcome, body: bytes) -> bool:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreError("the disk is gone")
        assert setup.health.holds(STORE_FAILING)
        return await close_event(event_id, outcome, body)

    monkeypatch.setattr(setup.inbox, "close_event", failing)
    monkeypatch.setattr(dispatch_module, "STORE_PAUSE_SECONDS", 0.01)
    await setup.accept("e1", "why?")
    async with serving(setup.dispatcher()):
        await setup.all_closed.wait()
    assert not setup.health.holds(STORE_FAILING)
    assert setup.closed == {"e1": Outcome.ANSWERED}
    assert len(setup.answers.asked) == 1  # the answer was kept, not made again


async def test_an_error_says_code_hint_and_facts() -> None:
    event = Event(
        seq=1, id="e1", source="t", topic="t", payload=b"", reply_topic="r", correlation=None, received_at=0.0,
        answer_by=None, expires_at=None,
    )  # fmt: skip
    body = json.loads(Rendering().error(event, EdgedError("broken", hint="mend it", part="pump")))
    assert body["error"] == {
        "code": "internal", "message": "broken", "hint": "mend it", "retryable": False, "facts": {"part": "pump"},
    }  # fmt: skip


async def test_batch_events_wait_while_their_class_is_shed_and_hold_nobody_up(setup: Setup) -> None:
    def decide(event: Event) -> Question:
        text = event.payload.decode()
        if text == "nonsense":
            raise RequestError("no question")
        return Question(text=text, priority="batch" if text.startswith("batch") else "interactive")

    for number in range(5):
        await setup.accept(f"b{number}", f"batch {number}")
    await setup.accept("late", "batch late", expires_at=NOW - 1)
    await setup.accept("bad", "nonsense")
    await setup.accept("i", "now")
    setup.expected, setup.shedding = 3, True
    dispatcher = setup.dispatcher(decide, concurrency=1)
    async with serving(dispatcher):
        await setup.all_closed.wait()
        assert setup.closed == {"late": Outcome.EXPIRED, "bad": Outcome.REJECTED, "i": Outcome.ANSWERED}
        setup.all_closed.clear()
        setup.expected, setup.shedding = 8, False
        dispatcher.wake()
        await setup.all_closed.wait()
    assert {setup.closed[f"b{number}"] for number in range(5)} == {Outcome.ANSWERED}
