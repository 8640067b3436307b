"""events.db: accepted once, closed once, published until acknowledged, pruned by age and bytes."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edged.events.event import Incoming, Outcome, answer_id
from edged.events.inbox import REDELIVERY_WINDOW_EVENTS, Inbox


@pytest.fixture
async def inbox(tmp_path: Path) -> AsyncIterator[Inbox]:
    opened = await Inbox.open(tmp_path / "events.db")
    yield opened
    await opened.close()


def incoming(event_id: str | None = None, **changes: object) -> Incoming:
    values: dict[str, object] = {
        "id": event_id,
        "source": "mqtt",
        "topic": "edged/query",
        "payload": b"why?",
        "reply_topic": None,
        "reply_prefix": "edged/answer",
        "received_at": 1000.0,
        **changes,
    }
    return Incoming(**values)  # type: ignore[arg-type]


async def test_an_accepted_event_is_there_after_a_restart(tmp_path: Path) -> None:
    first = await Inbox.open(tmp_path / "events.db")
    accepted = await first.accept(incoming("e1", correlation=b"\x00\xff", answer_by=1010.0, expires_at=1020.5))
    await first.close()
    second = await Inbox.open(tmp_path / "events.db")
    (event,) = await second.open_events(10)
    await second.close()
    assert (accepted.id, accepted.status) == ("e1", "new")
    assert (event.id, event.payload, event.correlation) == ("e1", b"why?", b"\x00\xff")
    assert (event.reply_topic, event.answer_by, event.expires_at) == ("edged/answer/e1", 1010.0, 1020.5)


async def test_two_equal_readings_without_an_id_are_two_events(inbox: Inbox) -> None:
    first = await inbox.accept(incoming(delivery="s:1:x"))
    second = await inbox.accept(incoming(delivery="s:2:x"))
    assert first.id != second.id
    assert (first.status, second.status) == ("new", "new")


async def test_a_redelivery_is_recognised_as_the_same_event(inbox: Inbox) -> None:
    first = await inbox.accept(incoming(delivery="s:7:x"))
    again = await inbox.accept(incoming(delivery="s:7:x", redelivered=True))
    assert again.id == first.id
    assert again.status == "open"


async def test_an_equal_transmission_without_the_dup_flag_is_a_new_event(inbox: Inbox) -> None:
    first = await inbox.accept(incoming(delivery="s:7:x"))
    second = await inbox.accept(incoming(delivery="s:7:x"))
    assert second.id != first.id


async def test_a_redelivery_is_not_mistaken_for_an_event_of_long_ago(inbox: Inbox) -> None:
    first = await inbox.accept(incoming(delivery="s:7:x"))
    await asyncio.gather(*(inbox.accept(incoming()) for _ in range(REDELIVERY_WINDOW_EVENTS)))
    late = await inbox.accept(incoming(delivery="s:7:x", redelivered=True))
    assert late.id != first.id


async def test_an_event_gets_exactly_one_outcome(inbox: Inbox) -> None:
    await inbox.accept(incoming("e1"))
    assert await inbox.close_event("e1", Outcome.ANSWERED, b"one")
    assert not await inbox.close_event("e1", Outcome.FAILED, b"two")
    assert await inbox.answer("e1") == b"one"
    assert [message.body for message in await inbox.outgoing(10)] == [b"one"]


async def test_a_known_id_is_answered_from_the_stored_outcome(inbox: Inbox) -> None:
    await inbox.accept(incoming("e1"))
    await inbox.close_event("e1", Outcome.ANSWERED, b"one")
    again = await inbox.accept(incoming("e1", reply_topic="reply/here", correlation=b"c"))
    messages = await inbox.outgoing(10)
    assert again.status == "closed"
    assert [(message.topic, message.body) for message in messages] == [
        ("edged/answer/e1", b"one"),
        ("reply/here", b"one"),
    ]


async def test_a_rejected_event_is_closed_in_the_same_transaction(inbox: Inbox) -> None:
    accepted = await inbox.reject(incoming(), lambda event_id: f"bad {event_id}".encode())
    assert await inbox.open_events(10) == []
    assert await inbox.answer(accepted.id) == f"bad {accepted.id}".encode()


async def test_the_nearest_deadline_comes_first_then_the_order_of_arrival(inbox: Inbox) -> None:
    for event_id, answer_by in (("late", None), ("later", None), ("soon", 50.0), ("sooner", 10.0)):
        await inbox.accept(incoming(event_id, answer_by=answer_by))
    assert [event.id for event in await inbox.open_events(10)] == ["sooner", "soon", "late", "later"]
    assert [event.id for event in await inbox.open_events(2, leave_out=["sooner"])] == ["soon", "late"]


async def test_pruning_forgets_old_and_surplus_events_but_never_open_or_unpublished_ones(inbox: Inbox) -> None:
    for number in range(6):
        await inbox.accept(incoming(f"e{number}", payload=b"x" * 100))
    for number in range(5):
        await inbox.close_event(f"e{number}", Outcome.ANSWERED, b"y" * 100)
    for message in (await inbox.outgoing(10))[:4]:
        await inbox.published(message.seq)
    assert await inbox.prune(closed_before=0.0, keep_bytes=450) == 2
    assert [await inbox.answer(f"e{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert await inbox.prune(closed_before=1e12, keep_bytes=10**9) == 2
    counts = await inbox.counts()
    assert (counts["open"], counts["answered"], counts["outbox"]) == (1, 1, 1)


async def test_what_is_remembered_survives_and_is_replaced(inbox: Inbox) -> None:
    assert await inbox.remembered("k") is None
    await inbox.remember("k", "1")
    await inbox.remember("k", "2")
    assert await inbox.remembered("k") == "2"


def test_an_answer_has_the_same_id_before_and_after_any_crash() -> None:
    assert answer_id("e1") == answer_id("e1") != answer_id("e2")
