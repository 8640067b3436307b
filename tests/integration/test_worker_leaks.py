"""Real workers do not grow: their own memory over two thousand small requests, and what memray says they keep."""

import asyncio
import contextlib
import itertools
import json
import os
import statistics
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edged.config import Config
from edged.models.catalog import Catalog
from edged.probe.digging import Kept, read_kept
from edged.types import Grammar, JsonSchema, Sampling, Segment
from edged.workers.protocol import WorkerSettings
from edged.workers.state import WorkerState
from edged.workers.worker import Worker

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

WARM_UP = 1500
"""Until then buffers reach their full size and the allocator's heaps theirs: seen to end between 1,250 and 1,650."""
REQUESTS = 2000
ROUND = 50
SERIES = 3
"""How often growth is looked for before it counts as one: a leak goes on, a heap that found its size does not."""
LANES = 8
RECORDED = 700
"""So that a place that is counted holds more than the 80 freed dicts, and as many tables of their keys, that CPython
keeps for the next one: those look as if they were in use."""
LARGEST_SLOPE = 50.0
"""Bytes a request. A Python object kept for each request is more."""
CONTEXT_TOKENS = 512

Memory = tuple[int, int]
"""The chat and the embedding worker's own memory, bytes."""


class Workers:
    """A chat and an embedding worker, asked many small things."""

    def __init__(self, chat: Worker, embed: Worker) -> None:
        self.chat = chat
        self.embed = embed

    async def ask(self, numbers: Iterable[int]) -> Memory:
        """One request for each number, several at a time; their memory when all is done."""
        queue = iter(numbers)
        await asyncio.gather(*(self._lane(queue) for _ in range(LANES)))
        await self._generate(0)  # whatever was cancelled is over then
        return own_memory(self.chat), own_memory(self.embed)

    async def fill(self) -> None:
        """Touch every cell of the KV cache and every buffer to its end: what nobody touched takes no memory yet."""
        await asyncio.gather(*(self._generate(0, " pump" * (CONTEXT_TOKENS // LANES - 8)) for _ in range(LANES)))
        for texts in ([" pump" * 1000], [" pump" * 14] * 32):
            await self.embed.embed(texts)

    async def _lane(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            match number % 20:
                case 0 | 4 | 8 | 12 | 16:
                    await self.embed.embed([f"pump number {number} " * (1 + number % 5)])
                case 1 | 5 | 9 | 13 | 17:
                    await self._generate(number, cancelled=True)
                case 2:
                    await self._generate(number, output=Grammar('root ::= "yes" | "no"'))
                case 6:
                    await self._generate(number, output=JsonSchema(json.dumps({"enum": [number, number + 1]})))
                case 10:
                    await self._generate(number, sampling=Sampling(temperature=0.8, top_k=3, seed=number % 7))
                case 14:
                    await self._generate(
                        number, "Grease the pump every 500 hours or once in a month.", prefix_segments=1
                    )
                case _:
                    await self._generate(number)

    async def _generate(self, number: int, text: str = "", *, cancelled: bool = False, **how: Any) -> None:
        prompt = [Segment(text), Segment(f"Item {number}")] if text else [Segment(f"Item {number}")]
        async with contextlib.aclosing(self.chat.generate(prompt, max_tokens=2, **how)) as items:
            async for _ in items:
                if cancelled:
                    return


def own_memory(worker: Worker) -> int:
    """Bytes of a worker's process in RAM that are no file's: a mapped model's pages come and go."""
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.fixture(scope="module")
def settings(models_home: Path) -> tuple[WorkerSettings, WorkerSettings]:
    """Of a small chat worker and an embedding worker."""
    files = Catalog(models_home / "models", models_home / "cache")
    chat = WorkerSettings(
        kind="chat",
        model=str(files.path(Config().chat.model)),
        threads=os.cpu_count() or 1,
        context_tokens=CONTEXT_TOKENS,
        sequences=LANES,
        prefix_cache_bytes=2_000_000,
    )
    model = str(files.path(Config().embed.model))
    return chat, WorkerSettings(kind="embed", model=model, threads=1, batch_tokens=512)


@contextlib.asynccontextmanager
async def serving(folder: Path, settings: tuple[WorkerSettings, WorkerSettings]) -> AsyncIterator[Workers]:
    workers = [Worker(each, folder / f"{each.kind}.sock", on_state=lambda _state, _why: None) for each in settings]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            await worker.settled()
            assert worker.state is WorkerState.READY
        yield Workers(*workers)
    finally:
        for worker in workers:
            await worker.stop()


def slope(memory: Sequence[int]) -> float:
    """Bytes a request, the median over all pairs of rounds (Theil and Sen); ``memory`` is that of each round.

    1.5 MB come and go, as the allocator keeps them or gives them back: one round without them must not tilt a line.
    """
    pairs = itertools.combinations(enumerate(memory), 2)
    return statistics.median((later - former) / ((j - i) * ROUND) for (i, former), (j, later) in pairs)


def growing(kept: Sequence[Kept], requests: int) -> list[Kept]:
    """Places that still held something for every fourth request. A list that grows now and then is one piece."""
    return [each for each in kept if each.allocations >= requests / 4]


def test_a_leak_of_one_small_object_a_request_has_a_slope_that_is_seen() -> None:
    rounds = range(REQUESTS // ROUND)
    pages = [100_000_000 + number * ROUND * 64 // 4096 * 4096 for number in rounds]
    assert slope(pages) > LARGEST_SLOPE
    assert slope([100_000_000 + number % 3 * 1_500_000 for number in rounds]) == pytest.approx(0, abs=1e-3)
    assert slope([100_000_000 - (number == 4) * 1_500_000 for number in rounds]) == 0


async def test_two_thousand_small_requests_leave_no_memory_behind(
    tmp_path: Path, settings: tuple[WorkerSettings, WorkerSettings]
) -> None:
    numbers = itertools.count()
    async with serving(tmp_path, settings) as workers:
        await workers.fill()
        await workers.ask(itertools.islice(numbers, WARM_UP))
        for _ in range(SERIES):
            memory = [await workers.ask(itertools.islice(numbers, ROUND)) for _ in range(REQUESTS // ROUND)]
            series = dict(zip(("chat", "embed"), zip(*memory, strict=True), strict=True))
            grown = {name: each for name, each in series.items() if slope(each) >= LARGEST_SLOPE}
            if not grown:
                break
        assert not grown

        kept: dict[str, list[Kept]] = {}
        for worker in (workers.chat, workers.embed):
            capture = tmp_path / f"{worker.settings.kind}.memray"
            await worker.inspect(allocations=capture)
            await workers.ask(itertools.islice(numbers, RECORDED))
            await worker.inspect()
            kept[worker.settings.kind] = await asyncio.to_thread(read_kept, capture)
        assert {name: growing(each, RECORDED) for name, each in kept.items()} == {"chat": [], "embed": []}
