"""Each of a real worker's computing threads has a core of its own while there are as many cores as such threads."""

import asyncio
import contextlib
import functools
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edged.config import Config
from edged.models.catalog import Catalog
from edged.types import Segment
from edged.workers.protocol import Tune, WorkerSettings
from edged.workers.state import WorkerState
from edged.workers.worker import Worker

CORES = frozenset(sorted(os.sched_getaffinity(0))[:2])
FIRST, SECOND = (frozenset({core}) for core in sorted(CORES)) if len(CORES) == 2 else (CORES, CORES)
LONGEST_SECONDS = 60.0

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="threads cannot be apart on one core")


@pytest.fixture
def chat_file(models_home: Path) -> Path:
    return Catalog(models_home / "models", models_home / "cache").path(Config().chat.model)


@contextlib.asynccontextmanager
async def serving(folder: Path, file: Path, *, threads: int = 2) -> AsyncIterator[Worker]:
    """A worker that is put on two cores before it loads its model."""

    async def on_spawn(pid: int) -> None:
        os.sched_setaffinity(pid, CORES)

    settings = WorkerSettings(kind="chat", model=str(file), threads=threads, context_tokens=512, sequences=2)
    worker = Worker(settings, folder / "w.sock", on_state=lambda _state, _why: None, on_spawn=on_spawn)
    worker.start()
    try:
        async with asyncio.timeout(LONGEST_SECONDS):
            await worker.settled()
        assert worker.state is WorkerState.READY
        yield worker
    finally:
        await worker.stop()


async def compute(worker: Worker) -> None:
    async with asyncio.timeout(LONGEST_SECONDS):
        async for _ in worker.generate([Segment("One, two,")], max_tokens=3):
            pass


def tune(worker: Worker, threads: int) -> None:
    worker.tune(Tune(sequences=2, threads=threads, prefix_cache_bytes=1 << 20))


def tasks(worker: Worker) -> list[int]:
    return sorted(int(task.name) for task in Path(f"/proc/{worker.pid}/task").iterdir())


def apart(worker: Worker) -> list[frozenset[int]]:
    """The cores of those threads that may not use all, the main thread first."""
    allowed = [frozenset(os.sched_getaffinity(task)) for task in tasks(worker)]
    return [each for each in allowed if each != CORES]


async def test_as_many_threads_as_cores_have_one_each_and_all_others_have_all(tmp_path: Path, chat_file: Path) -> None:
    async with serving(tmp_path, chat_file) as worker:
        assert apart(worker) == []
        await compute(worker)
        assert apart(worker) == [SECOND, FIRST]
        assert len(tasks(worker)) > 2


async def test_a_thread_fewer_may_move_and_with_all_of_them_each_has_its_core_again(
    tmp_path: Path, chat_file: Path
) -> None:
    async with serving(tmp_path, chat_file) as worker:
        await compute(worker)
        tune(worker, 1)
        await compute(worker)
        assert apart(worker) == []
        tune(worker, 2)
        await compute(worker)
        assert apart(worker) == [SECOND, FIRST]


async def test_a_worker_that_is_looked_into_has_no_thread_that_began_on_one_core(
    tmp_path: Path, chat_file: Path
) -> None:
    async with serving(tmp_path, chat_file) as worker:
        await compute(worker)
        await worker.inspect(allocations=tmp_path / "allocations")
        assert apart(worker) == []
        await compute(worker)
        assert apart(worker) == []
        await worker.inspect()
        await compute(worker)
        assert apart(worker) == [SECOND, FIRST]


async def test_one_thread_may_move(tmp_path: Path, chat_file: Path) -> None:
    async with serving(tmp_path, chat_file, threads=1) as worker:
        await compute(worker)
        assert apart(worker) == []


@pytest.mark.parametrize("put", [CORES, FIRST, SECOND])
async def test_what_others_decide_holds_until_they_decide_otherwise(
    tmp_path: Path, chat_file: Path, put: frozenset[int]
) -> None:
    async with serving(tmp_path, chat_file) as worker:
        await compute(worker)
        set_all = functools.partial(subprocess.run, check=True, capture_output=True)
        set_all(["taskset", "-apc", ",".join(map(str, put)), str(worker.pid)])
        await compute(worker)
        used = {core for task in tasks(worker) for core in os.sched_getaffinity(task)}
        assert used == put
        set_all(["taskset", "-apc", ",".join(map(str, CORES)), str(worker.pid)])
        await compute(worker)
        assert apart(worker) == [SECOND, FIRST]
