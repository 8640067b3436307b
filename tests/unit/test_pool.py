"""Leases: who gets which model, when a model is free to go, and what a hold does."""

import asyncio
from pathlib import Path

import pytest

from edged.errors import DeadlineError, WorkerUnavailableError
from edged.models.template import ChatTemplate
from edged.serving.chat import LocalChat
from edged.serving.pool import ChatPool
from edged.workers.protocol import WorkerSettings
from edged.workers.worker import Worker


@pytest.fixture
def chats(tmp_path_factory: pytest.TempPathFactory) -> list[LocalChat]:
    folder = tmp_path_factory.mktemp("run")
    return [LocalChat(_idle(folder / name), ChatTemplate.plain(), f"{name}@1") for name in ("one", "two")]


def _idle(path: Path) -> Worker:
    settings = WorkerSettings(kind="chat", model="none", threads=1)
    return Worker(settings, path, on_state=lambda _state, _why: None)


async def test_without_a_model_a_lease_says_so() -> None:
    with pytest.raises(WorkerUnavailableError, match="there is no chat model"):
        async with ChatPool(None).lease():
            pass


async def test_a_model_is_drained_when_its_last_lease_is_given_back(chats: list[LocalChat]) -> None:
    one, two = chats
    pool = ChatPool(one)
    async with pool.lease() as first:
        pool.serve(two)
        async with pool.lease() as second:
            assert (first.name, second.name) == ("one@1", "two@1")
        draining = asyncio.create_task(pool.drained(one))
        await asyncio.sleep(0)
        assert not draining.done()
    await draining
    await pool.drained(one)


async def test_a_pool_forgets_models_that_nobody_holds(chats: list[LocalChat]) -> None:
    pool = ChatPool(chats[0])
    for number in range(100):
        async with pool.lease():
            pool.serve(chats[number % 2])
        await pool.drained(chats[(number + 1) % 2])
        await pool.drained(chats[number % 2])
    assert len(pool._seats()) == 1


async def test_a_candidate_gets_its_share_and_no_more(chats: list[LocalChat]) -> None:
    one, two = chats
    chances = iter([number / 100 for number in range(100)])
    pool = ChatPool(one, chance=lambda: next(chances))
    pool.try_out(two, 0.3)
    assert pool.names == ("one@1", "two@1")
    names = []
    for _ in range(100):
        async with pool.lease() as chat:
            names.append(chat.name)
    assert names.count("two@1") == 30


async def test_a_promoted_candidate_keeps_those_who_hold_it(chats: list[LocalChat]) -> None:
    one, two = chats
    pool = ChatPool(one, chance=lambda: 0.0)
    pool.try_out(two, 0.5)
    async with pool.lease() as chat:
        pool.promote()
        assert (pool.active, pool.candidate, chat.name) == (two, None, "two@1")
        draining = asyncio.create_task(pool.drained(two))
        await asyncio.sleep(0)
        assert not draining.done()
    await draining


async def test_held_requests_go_on_with_the_model_that_ends_the_hold(chats: list[LocalChat]) -> None:
    pool = ChatPool(chats[0])
    pool.hold(60.0)

    async def ask() -> str:
        async with pool.lease() as chat:
            return chat.name

    waiting = asyncio.create_task(ask())
    await asyncio.sleep(0)
    assert not waiting.done()
    pool.serve(chats[1])
    assert await waiting == "two@1"


async def test_a_hold_is_not_waited_for_beyond_the_deadline(chats: list[LocalChat]) -> None:
    pool = ChatPool(chats[0])
    pool.hold(60.0)
    assert 59 < pool.held_seconds <= 60
    with pytest.raises(WorkerUnavailableError) as refused:
        async with pool.lease(deadline_seconds=5.0):
            pass
    assert refused.value.facts["retry_after_seconds"] == pytest.approx(60.0, abs=1)
    pool.hold(0.0)
    with pytest.raises(DeadlineError):
        async with pool.lease(deadline_seconds=0.51):
            pass
    pool.release()
    assert pool.held_seconds == 0


async def test_nothing_is_reported_of_a_lease_that_asked_nothing(chats: list[LocalChat]) -> None:
    pool = ChatPool(chats[0])
    async with pool.lease() as chat:
        chat.report(overlap=1.0)
    assert pool.observations()[0].requests == 0
