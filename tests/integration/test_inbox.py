"""events.db: accepted once, closed once, published until acknowledged, pruned by age and bytes."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.events.event import Event, Incoming, Outcome, answer_id
from edged.events.inbox import REDELIVERY_WINDOW_EVENTS, Accepted, Inbox


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
    again = await inbox.accept(incoming("e1", reply_topic="reply/here", correlation=b"c", received_at=9.0))
    messages = await inbox.outgoing(10)
    assert again.status == "closed"
    assert [(message.topic, message.body) for message in messages] == [
        ("edged/answer/e1", b"one"),
        ("reply/here", b"one"),
    ]


async def test_a_rejected_event_is_closed_in_the_same_transaction(inbox: Inbox) -> None:
    accepted = await inbox.reject(incoming(), lambda event_id, _: f"bad {event_id}".encode())
    assert await inbox.open_events(10) == []
    assert await inbox.answer(accepted.id) == f"bad {accepted.id}".encode()


async def publish_all(inbox: Inbox) -> list[tuple[str, bytes]]:
    messages = await inbox.outgoing(100)
    for message in messages:
        await inbox.published(message.seq)
    return [(message.topic, message.body) for message in messages]


@pytest.mark.parametrize("change", [{"payload": b"where?"}, {"topic": "edged/other"}, {"source": "coap"}])
async def test_an_id_is_another_events_from_the_time_on_at_which_its_answer_is_out(
    inbox: Inbox, change: dict[str, object]
) -> None:
    await inbox.accept(incoming("e1"))
    (first,) = await inbox.open_events(10)
    assert (await inbox.accept(incoming("e1", **change))).status == "reused"
    await inbox.close_event("e1", Outcome.ANSWERED, b"one")
    assert (await inbox.accept(incoming("e1", **change))).status == "reused"
    assert await publish_all(inbox) == [("edged/answer/e1", b"one")]
    assert (await inbox.accept(incoming("e1", **change))).status == "new"
    (second,) = await inbox.open_events(10)
    assert second.id == "e1"
    assert second.answer_id != first.answer_id
    assert await inbox.answer("e1") is None


RETRYABLE, FINAL = (b'{"id":"e1","error":{"code":"c","retryable":%s}}' % word for word in (b"true", b"false"))


@pytest.mark.parametrize(
    ("outcome", "body", "status"),
    [
        (Outcome.FAILED, RETRYABLE, "new"),
        (Outcome.EXPIRED, FINAL, "new"),
        (Outcome.FAILED, FINAL, "closed"),
        (Outcome.REJECTED, FINAL, "closed"),
        (Outcome.ANSWERED, b"{}", "closed"),
    ],
)
async def test_what_failed_for_a_time_or_expired_is_asked_anew_by_the_same_message(
    inbox: Inbox, outcome: Outcome, body: bytes, status: str
) -> None:
    await inbox.accept(incoming("e1", delivery="s:1:x"))
    await inbox.close_event("e1", outcome, body)
    assert (await inbox.accept(incoming("e1", delivery="s:2:x"))).status == "closed"  # nobody has its answer yet
    await publish_all(inbox)
    assert (await inbox.accept(incoming("e1", delivery="s:3:x"))).status == status


async def test_a_redelivery_is_never_asked_anew(inbox: Inbox) -> None:
    await inbox.accept(incoming("e1", delivery="s:1:x"))
    await inbox.close_event("e1", Outcome.FAILED, RETRYABLE)
    await publish_all(inbox)
    assert (await inbox.accept(incoming("e1", delivery="s:1:x", redelivered=True))).status == "closed"
    assert await publish_all(inbox) == [("edged/answer/e1", RETRYABLE)]


async def test_a_refused_message_is_kept_beside_the_event_that_has_its_id(inbox: Inbox) -> None:
    await inbox.accept(incoming("e1"))
    other = incoming("e1", payload=b"where?", reply_topic="reply/here", delivery="s:2:x")
    refused = await inbox.reject(other, lambda event_id, _: f"no, {event_id}".encode())
    assert refused.status == "rejected"
    assert refused.id != "e1"
    again = msgspec.structs.replace(other, redelivered=True)
    assert await inbox.reject(again, lambda *_: b"never") == Accepted(refused.id, "closed")
    assert await publish_all(inbox) == [("reply/here", b"no, e1")] * 2
    assert [event.id for event in await inbox.open_events(10)] == ["e1"]


async def test_a_refusal_without_a_reply_topic_goes_to_the_topic_of_the_senders_id(inbox: Inbox) -> None:
    await inbox.accept(incoming("e1"))
    for redelivered in (False, True):
        other = incoming("e1", payload=b"where?", delivery="s:2:x", redelivered=redelivered)
        await inbox.reject(other, lambda *_: b"no")
    assert await publish_all(inbox) == [("edged/answer/e1", b"no")] * 2


class Send(msgspec.Struct, frozen=True):
    """A message with an id that others have, too; ``name`` is that of its transmission."""

    event_id: str
    content: bytes


class Step(Enum):
    """What else happens."""

    ANSWER = "the most urgent event is answered"
    FAIL = "the most urgent event fails for a time"
    PUBLISH = "the broker takes all answers"
    CUT = "the power goes, and the broker sends the last message again"


async def what_was_told(folder: Path, course: list[Send | Step]) -> list[bytes]:
    """All that was published, once every event is closed."""
    inbox = await Inbox.open(folder / "events.db")
    told: list[bytes] = []
    last: Incoming | None = None
    for number, step in enumerate([*course, *[Step.ANSWER] * len(course), Step.PUBLISH]):
        if isinstance(step, Send):
            last = incoming(step.event_id, payload=step.content, delivery=f"s:{number}:x", received_at=7.0)
            await receive(inbox, last)
        elif step is Step.PUBLISH:
            told += [body for _, body in await publish_all(inbox)]
        elif step is Step.CUT:
            await inbox.close()
            inbox = await Inbox.open(folder / "events.db")
            if last is not None:
                await receive(inbox, msgspec.structs.replace(last, redelivered=True))
        else:
            for event in await inbox.open_events(1):
                outcome = Outcome.ANSWERED if step is Step.ANSWER else Outcome.FAILED
                await inbox.close_event(event.id, outcome, told_of(event, failed=step is Step.FAIL))
    assert (await inbox.counts())["open"] == 0
    await inbox.close()
    return told


async def receive(inbox: Inbox, message: Incoming) -> None:
    if (await inbox.accept(message)).status == "reused":
        await inbox.reject(message, lambda event_id, own: refusal_of(event_id, own, message.payload))


def told_of(event: Event, *, failed: bool) -> bytes:
    content = event.payload.decode()
    return msgspec.json.encode(Told(event.id, event.answer_id, content, Retry(failed)))


def refusal_of(event_id: str, own: str, payload: bytes) -> bytes:
    return msgspec.json.encode(Told(event_id, own, payload.decode(), Retry(retryable=False)))


class Retry(msgspec.Struct, frozen=True):
    """As an error has it."""

    retryable: bool


class Told(msgspec.Struct, frozen=True):
    """A message to a sender, with the content that it is about."""

    id: str
    answer_id: str
    content: str
    error: Retry


SENDS = st.builds(Send, st.sampled_from(["1", "2"]), st.sampled_from([b"why?", b"where?", b"when?"]))


@given(course=st.lists(SENDS | st.sampled_from(Step), max_size=12))
def test_every_message_is_answered_for_its_own_content_however_ids_are_used(course: list[Send | Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bodies = asyncio.run(what_was_told(Path(folder), course))
    told = [msgspec.json.decode(body, type=Told) for body in bodies]
    one_a_name = {message.answer_id: message for message in told}
    assert set(told) == set(one_a_name.values())  # the same answer id, the same message
    sent = Counter((step.event_id, step.content.decode()) for step in course if isinstance(step, Send))
    got = Counter((message.id, message.content) for message in one_a_name.values())
    assert got.keys() == sent.keys()
    assert all(got[each] <= sent[each] for each in got)  # none is asked more often than it was sent


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
    assert answer_id("e1", 1, 7.0) == answer_id("e1", 1, 7.0)


def test_events_of_one_id_have_different_answer_ids() -> None:
    events = [("e1", 1, 7.0), ("e1", 2, 7.0), ("e1", 1, 8.0), ("e2", 1, 7.0)]
    assert len({answer_id(*event) for event in events}) == 4
