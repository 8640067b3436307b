"""Stored answers are published until acknowledged, in order, whatever the broker does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import structlog

from edged.errors import DiskFullError
from edged.events import outbox as outbox_module
from edged.events.event import Incoming, Outcome, Outgoing
from edged.events.inbox import Inbox
from edged.events.outbox import DisconnectedError, Outbox, PublishRefusedError
from edged.runtime.health import MQTT_REFUSED, STORE_FAILING, Health


class Broker:
    """Acknowledges, refuses some topics, or hangs up."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.up.set()
        self.got: list[str] = []
        self.offered: list[str] = []
        self.refused_topics: set[str] = set()
        self.hang_up_next = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.changed = asyncio.Event()

    async def connected(self) -> None:
        await self.up.wait()

    async def publish(self, message: Outgoing) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            self.offered.append(message.topic)
            if self.hang_up_next:
                self.hang_up_next -= 1
                raise DisconnectedError("gone")
            if message.topic in self.refused_topics:
                raise PublishRefusedError("not authorized")
            self.got.append(message.body.decode())
        finally:
            self.in_flight -= 1
            self.changed.set()

    async def until(self, count: int) -> None:
        await self._until(lambda: len(self.got) >= count)

    async def until_offered(self, count: int) -> None:
        await self._until(lambda: len(self.offered) >= count)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self.changed.clear()
            await self.changed.wait()


async def close_one(inbox: Inbox, name: str, prefix: str = "a") -> None:
    """Close an event: its answer goes to ``<prefix>/<name>``."""
    await inbox.accept(
        Incoming(id=name, source="t", topic="t", payload=b"", reply_topic=None, reply_prefix=prefix, received_at=0.0)
    )
    await inbox.close_event(name, Outcome.ANSWERED, name.encode())


@pytest.fixture
async def inbox(tmp_path: Path) -> AsyncIterator[Inbox]:
    opened = await Inbox.open(tmp_path / "events.db")
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def serving(outbox: Outbox) -> AsyncIterator[None]:
    task = asyncio.create_task(outbox.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def emptied(inbox: Inbox) -> None:
    while await inbox.outgoing(1):  # each look is a turn of the reader's thread, not a pause
        pass


async def test_all_are_published_in_order_within_the_window(inbox: Inbox) -> None:
    names = [f"e{number:02d}" for number in range(40)]
    for name in names:
        await close_one(inbox, name)
    broker = Broker()
    async with serving(Outbox(inbox, broker, Health(), window=4)):
        await broker.until(40)
        await emptied(inbox)
    assert broker.got == names
    assert broker.most_in_flight <= 4


async def test_a_message_cut_off_by_a_lost_connection_is_sent_again(inbox: Inbox) -> None:
    await close_one(inbox, "e1")
    broker = Broker()
    broker.hang_up_next = 3
    async with serving(Outbox(inbox, broker, Health(), window=4)):
        await broker.until(1)
        await emptied(inbox)
    assert broker.got == ["e1"]


async def test_nothing_is_sent_before_there_is_a_connection(inbox: Inbox) -> None:
    await close_one(inbox, "e1")
    broker = Broker()
    broker.up.clear()
    async with serving(Outbox(inbox, broker, Health(), window=4)):
        for _ in range(20):
            await asyncio.sleep(0)
        assert broker.got == []
        broker.up.set()
        await broker.until(1)


async def test_a_refused_message_holds_up_nobody_and_is_tried_again(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "REFUSED_PAUSE_SECONDS", 0.05)
    for number in range(6):
        await close_one(inbox, f"bad{number}", prefix="forbidden")
    await close_one(inbox, "good")
    broker, health = Broker(), Health()
    broker.refused_topics = {f"forbidden/bad{number}" for number in range(6)}
    outbox = Outbox(inbox, broker, health, window=2)
    async with serving(outbox):
        await broker.until(1)
        assert broker.got == ["good"]
        assert health.holds(MQTT_REFUSED)
        broker.refused_topics = set()
        await broker.until(7)
        await emptied(inbox)
    assert set(broker.got) == {"good", *(f"bad{number}" for number in range(6))}


async def cleared(health: Health) -> None:
    """Return once nothing is refused any more."""
    mended = asyncio.Event()
    health.subscribe(lambda: None if health.holds(MQTT_REFUSED) else mended.set())
    if health.holds(MQTT_REFUSED):
        await mended.wait()


async def test_however_many_are_refused_good_ones_go_out_at_once_and_the_others_later(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "REFUSED_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(outbox_module, "RETRIES_A_ROUND", 8)
    refused = [f"bad{number:02d}" for number in range(40)]
    for name in refused:
        await close_one(inbox, name, prefix="forbidden")
    broker, health = Broker(), Health()
    broker.refused_topics = {f"forbidden/{name}" for name in refused}
    outbox = Outbox(inbox, broker, health, window=4)
    async with serving(outbox):
        for number in range(10):
            await close_one(inbox, f"good{number}")
            outbox.wake()
            await broker.until(number + 1)
        assert broker.got == [f"good{number}" for number in range(10)]
        assert [held.text for held in health.conditions()] == [
            "the broker refused a message to forbidden/bad00: not authorized"
        ]
        broker.refused_topics = set()
        await broker.until(50)
        await emptied(inbox)
        await cleared(health)
    assert sorted(broker.got[10:]) == refused
    assert len(broker.got) == 50


async def test_refused_ones_are_tried_again_one_at_a_time_and_so_many_in_a_round(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "REFUSED_PAUSE_SECONDS", 3600.0)
    monkeypatch.setattr(outbox_module, "RETRIES_A_ROUND", 3)
    for number in range(5):
        await close_one(inbox, f"bad{number}", prefix="forbidden")
    broker = Broker()
    broker.refused_topics = {f"forbidden/bad{number}" for number in range(5)}
    outbox = Outbox(inbox, broker, Health(), window=4)
    async with serving(outbox):
        await broker.until_offered(5)
        broker.most_in_flight = 0
        for round_number, last in enumerate(("bad2", "bad4"), start=1):
            outbox._begin_round()
            outbox.wake()
            await broker.until_offered(5 + (3 if round_number == 1 else 5))
            assert broker.offered[-1] == f"forbidden/{last}"
    assert broker.most_in_flight == 1


async def test_messages_cut_off_go_out_again_before_later_ones_and_with_refused_ones_between(inbox: Inbox) -> None:
    names = [f"e{number}" for number in range(6)]
    for name in names:
        await close_one(inbox, name)
    broker = Broker()
    broker.refused_topics = {"a/e1"}
    broker.hang_up_next = 4
    async with serving(Outbox(inbox, broker, Health(), window=4)):
        await broker.until(5)
    assert broker.got == ["e0", "e2", "e3", "e4", "e5"]


async def test_what_is_refused_for_too_long_is_given_up_and_nothing_else(inbox: Inbox) -> None:
    for name, prefix in (("bad", "forbidden"), ("good", "a")):
        await close_one(inbox, name, prefix=prefix)
    broker = Broker()
    broker.refused_topics = {"forbidden/bad"}
    outbox = Outbox(inbox, broker, Health(), window=1)
    await outbox.give_up(1e12)  # not offered yet
    assert (await inbox.counts())["outbox"] == 2
    async with serving(outbox):
        await broker.until(1)
        while (await inbox.counts())["outbox"] > 1:  # each look is a turn of the reader's thread
            pass
        await outbox.give_up(0.0)  # too young
        assert (await inbox.counts())["outbox"] == 1
        with structlog.testing.capture_logs() as lines:
            await outbox.give_up(1e12)
    assert (await inbox.counts())["outbox"] == 0
    assert [(line["event"], line["answers"], line["topics"]) for line in lines] == [
        ("refused_answers_given_up", 1, ["forbidden/bad"])
    ]
    assert await inbox.prune(closed_before=1e12, keep_bytes=10**9) == 2


async def test_an_answer_whose_publishing_cannot_be_recorded_is_sent_once(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "STORE_PAUSE_SECONDS", 0.01)
    published, failures, health, mended = inbox.published, 3, Health(), asyncio.Event()
    health.subscribe(lambda: None if health.holds(STORE_FAILING) else mended.set())

    async def failing(seq: int) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise DiskFullError("no space left")
        assert health.holds(STORE_FAILING)
        await published(seq)

    monkeypatch.setattr(inbox, "published", failing)
    await close_one(inbox, "e1")
    broker = Broker()
    async with serving(Outbox(inbox, broker, health, window=4)):
        await mended.wait()
        await emptied(inbox)
    assert broker.got == ["e1"]


async def test_what_was_not_acknowledged_before_a_restart_is_sent_after_it(inbox: Inbox) -> None:
    await close_one(inbox, "e1")
    silent = Broker()
    silent.up.clear()
    async with serving(Outbox(inbox, silent, Health(), window=4)):
        pass
    broker = Broker()
    async with serving(Outbox(inbox, broker, Health(), window=4)):
        await broker.until(1)
    assert broker.got == ["e1"]
