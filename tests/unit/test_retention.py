"""Closed events go by age and size, refused answers by age, at once when the limits change."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from edged.config import Events
from edged.events.retention import SECONDS_A_DAY, Retention


class Store:
    """An inbox and an outbox that remember what they were told to forget."""

    def __init__(self) -> None:
        self.pruned: asyncio.Queue[tuple[float, int]] = asyncio.Queue()
        self.given_up = 0.0

    async def prune(self, *, closed_before: float, keep_bytes: int) -> int:
        self.pruned.put_nowait((closed_before, keep_bytes))
        return 3

    async def give_up(self, created_before: float) -> None:
        self.given_up = created_before

    async def asked(self) -> tuple[float, int]:
        return await asyncio.wait_for(self.pruned.get(), 10)


@pytest.fixture
async def running() -> AsyncIterator[tuple[Store, Retention, list[None]]]:
    store, gone = Store(), list[None]()
    both: Any = store
    retention = Retention(both, both, Events(keep_days=2.0, keep_bytes=100), lambda: gone.append(None))
    task = asyncio.create_task(retention.run())
    yield store, retention, gone
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_new_limits_are_used_at_once(running: tuple[Store, Retention, list[None]]) -> None:
    store, retention, gone = running
    before, size = await store.asked()
    assert time.time() - before == pytest.approx(2 * SECONDS_A_DAY, abs=60)
    assert size == 100
    retention.use(Events(keep_days=1.0, keep_bytes=10))
    before, size = await store.asked()
    assert time.time() - before == pytest.approx(SECONDS_A_DAY, abs=60)
    assert size == 10
    assert store.given_up == before
    assert gone == [None, None]
    assert store.pruned.empty()
