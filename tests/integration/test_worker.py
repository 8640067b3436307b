"""A worker role over real processes that die, hang, lie and lag: tests/fake_worker.py instead of the engine."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from edged.errors import (
    DeadlineError,
    PromptTooLongError,
    QueueFullError,
    WorkerError,
    WorkerLostError,
    WorkerUnavailableError,
)
from edged.types import Segment
from edged.workers import worker as worker_module
from edged.workers.process import WorkerProcess
from edged.workers.protocol import Cancel, Finished, Generate, Piece, Request, WorkerSettings
from edged.workers.state import PINNED, KeepWarm, WorkerState
from edged.workers.worker import Lost, Worker

TESTS = Path(__file__).parents[1]
FAKE = (sys.executable, str(TESTS / "fake_worker.py"))
PARENT = TESTS / "worker_parent.py"
SETTINGS = WorkerSettings(kind="chat", model="none.gguf", threads=1, context_tokens=512, sequences=2, queue_limit=3)
LONGEST_SECONDS = 20.0

Say = Callable[[str], None]


class Role:
    """A worker with the history of its states, and a way to wait for the next one."""

    def __init__(
        self, folder: Path, *, stalled: float = 60.0, load: float = 60.0, keep_warm: KeepWarm = PINNED
    ) -> None:
        self.states: list[tuple[WorkerState, str]] = []
        self._changed = asyncio.Event()
        self.socket_path = folder / "run" / "w.sock"
        self.worker = Worker(
            SETTINGS,
            self.socket_path,
            on_state=self._on_state,
            command=FAKE,
            keep_warm=keep_warm,
            stalled_after_seconds=stalled,
            load_timeout_seconds=load,
        )

    def _on_state(self, state: WorkerState, why: str) -> None:
        self.states.append((state, why))
        self._changed.set()

    async def until(self, state: WorkerState, *, times: int = 1) -> str:
        """Wait until it has been in ``state`` so many times; why it came there last."""
        async with asyncio.timeout(LONGEST_SECONDS):
            while len(reasons := [why for each, why in self.states if each is state]) < times:
                self._changed.clear()
                await self._changed.wait()
        return reasons[-1]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Tell the fake workers started from now on how to behave."""
    return lambda words: monkeypatch.setenv("FAKE_WORKER", words)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "SMALLEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(worker_module, "STOP_GRACE_SECONDS", 0.5)


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *, stalled: float = 60.0, load: float = 60.0, keep_warm: KeepWarm = PINNED
) -> AsyncIterator[Role]:
    role = Role(folder, stalled=stalled, load=load, keep_warm=keep_warm)
    role.worker.start()
    try:
        yield role
    finally:
        await role.worker.stop()


def segments(text: str) -> list[Segment]:
    return [Segment(text)]


async def ask(worker: Worker, prompt: str, deadline: float | None = None) -> list[Piece | Lost | Finished]:
    """Everything a request brings, within the longest time a test may take."""
    async with (
        asyncio.timeout(LONGEST_SECONDS),
        contextlib.aclosing(worker.generate(segments(prompt), max_tokens=50, deadline_seconds=deadline)) as items,
    ):
        return [item async for item in items]


def text_of(items: list[Piece | Lost | Finished]) -> str:
    return "".join(item.text for item in items if isinstance(item, Piece))


async def eventually(holds: Callable[[], bool]) -> None:
    """Return when it holds, for what the system or another process does and nobody announces."""
    async with asyncio.timeout(LONGEST_SECONDS):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def ended(pid: int | None) -> bool:
    """Whether a process is gone, and reaped where it was our child."""
    assert pid is not None
    return not psutil.pid_exists(pid)


# --- the good case ---------------------------------------------------------------------------------


async def test_a_request_made_before_the_worker_is_ready_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        items = await ask(role.worker, "- Grease every 500 h.\nQuestion: when?")
        assert text_of(items) == "Grease every 500 h."
        assert isinstance(items[-1], Finished)
        assert [state for state, _ in role.states] == [WorkerState.STARTING, WorkerState.READY]
        assert role.worker.unfinished == 0


async def test_many_requests_at_once_each_get_their_own_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        answers = await asyncio.gather(*(ask(role.worker, f"- Fact {number}.") for number in range(5)))
        assert [text_of(items) for items in answers] == [f"Fact {number}." for number in range(5)]


async def test_what_was_served_is_counted_tokens_as_they_come_and_all_else_at_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        await ask(role.worker, "tokens=4 three words")
        stream = role.worker.generate(segments("tokens=9 pause=0.2"), max_tokens=50)
        assert isinstance(await anext(stream), Piece)
        grown = role.worker.served
        await stream.aclose()
        await role.worker.embed(["five words are in this"])
        served = role.worker.served
    assert (grown.requests, grown.prompt_tokens, grown.finished_tokens, grown.completion_tokens) == (1, 3, 4, 5)
    assert (served.requests, served.prompt_tokens, served.finished_tokens) == (2, 8, 4)


async def test_texts_become_unit_vectors_in_their_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        vectors = await role.worker.embed(["pump oil", "boiler", "oil pump"])
        assert vectors.shape == (3, 384)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0)
        assert np.allclose(vectors[0], vectors[2])
        assert vectors[0] @ vectors[1] < 0.5
        assert (await role.worker.embed([])).shape == (0, 384)


async def test_max_tokens_ends_a_generation_by_length(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        last = (await ask(role.worker, "tokens=80"))[-1]
        assert isinstance(last, Finished)
        assert (last.reason, last.completion_tokens) == ("length", 50)


# --- refusals --------------------------------------------------------------------------------------


async def test_a_prompt_longer_than_the_context_is_a_named_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        with pytest.raises(PromptTooLongError):
            await ask(role.worker, "word " * 600)


@pytest.mark.parametrize("text", ["\ud800", "x" * 2000], ids=["no-unicode", "too-long-for-a-frame"])
async def test_what_cannot_be_sent_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("edged.workers.protocol.MAX_FRAME_BYTES", 1000)
    async with serving(tmp_path) as role:
        with pytest.raises(PromptTooLongError):
            await ask(role.worker, text)
        assert role.worker.unfinished == 0
        assert text_of(await ask(role.worker, "- Fine.")) == "Fine."


async def test_beyond_the_queue_limit_requests_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        limit = SETTINGS.queue_limit + SETTINGS.sequences
        asked = [asyncio.create_task(ask(role.worker, "pause=0.05 tokens=3")) for _ in range(limit)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await ask(role.worker, "one more")
        assert all(isinstance(items[-1], Finished) for items in await asyncio.gather(*asked))
        assert text_of(await ask(role.worker, "- Room again.")) == "Room again."


# --- an asker that goes away -----------------------------------------------------------------------


async def test_closing_a_stream_cancels_the_work_in_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Request] = []
    send = WorkerProcess.send

    def remember(process: WorkerProcess, request: Request) -> None:
        sent.append(request)
        send(process, request)

    monkeypatch.setattr(WorkerProcess, "send", remember)
    async with serving(tmp_path) as role:
        stream = role.worker.generate(segments("pause=0.01 tokens=1000"), max_tokens=1000)
        async with contextlib.aclosing(stream):
            assert isinstance(await anext(stream), Piece)
        assert [type(request).__name__ for request in sent] == ["Generate", "Cancel"]
        assert isinstance(sent[0], Generate)
        assert isinstance(sent[1], Cancel)
        assert sent[0].id == sent[1].id
        assert role.worker.unfinished == 0
        assert text_of(await ask(role.worker, "- Still there.")) == "Still there."


async def test_a_request_cancelled_before_it_was_sent_is_never_sent(tmp_path: Path, say: Say) -> None:
    counter = tmp_path / "counter"
    async with serving(tmp_path) as role:
        task = asyncio.create_task(ask(role.worker, f"kill@request counter={counter}"))
        await asyncio.sleep(0)
        assert role.worker.unfinished == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert role.worker.unfinished == 0
        assert text_of(await ask(role.worker, "- Fine.")) == "Fine."
        assert not counter.exists()


async def test_an_asker_cancelled_while_it_waits_leaves_nothing_behind(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        await role.until(WorkerState.READY)
        tasks: list[asyncio.Task[object]] = [
            *(asyncio.create_task(ask(role.worker, "pause=30 tokens=2")) for _ in range(3)),
            asyncio.create_task(role.worker.embed(["pause=30"])),
        ]
        await asyncio.sleep(0)
        assert role.worker.unfinished == 4
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert role.worker.unfinished == 0
        assert text_of(await ask(role.worker, "- Fine.")) == "Fine."


# --- deadlines -------------------------------------------------------------------------------------


async def test_a_deadline_in_the_middle_of_a_stream_is_a_named_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        await role.until(WorkerState.READY)
        with pytest.raises(DeadlineError):
            await ask(role.worker, "pause=0.05 tokens=40", deadline=0.3)
        assert role.worker.unfinished == 0


async def test_the_deadline_of_an_embedding_is_a_named_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        await role.until(WorkerState.READY)
        with pytest.raises(DeadlineError):
            await role.worker.embed(["pause=30"], deadline_seconds=0.1)
        assert role.worker.unfinished == 0
        assert (await role.worker.embed(["soon"], deadline_seconds=LONGEST_SECONDS)).shape == (1, 384)


@pytest.mark.parametrize("words", ["hang@start", "exit@start", "hang@request"])
async def test_a_deadline_holds_while_no_worker_answers(tmp_path: Path, say: Say, words: str) -> None:
    say(words)
    async with serving(tmp_path) as role:
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            await ask(role.worker, "now", deadline=0.2)
        assert time.monotonic() - started < 5.0
        assert role.worker.unfinished == 0


# --- a worker that dies ----------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["kill", "segv", "exit", "garbage", "long-frame"])
async def test_after_a_death_in_mid_stream_the_request_runs_once_more_and_the_asker_is_told(
    tmp_path: Path, action: str
) -> None:
    async with serving(tmp_path) as role:
        items = await ask(role.worker, f"{action}@stream counter={tmp_path / 'counter'} times=1 tokens=3")
        lost = items.index(Lost())
        assert text_of(items[lost:]) == "word0 word1 word2"
        assert items.count(Lost()) == 1
        assert isinstance(items[-1], Finished)
        assert role.worker.restarts == 1


@pytest.mark.parametrize(
    ("action", "why"),
    [
        ("kill", "signal 9"),
        ("segv", "signal 11"),
        ("exit", "exit status 1: out of luck"),
        ("garbage", "sent garbage"),
        ("long-frame", "sent garbage: a frame of"),
    ],
)
async def test_the_reason_of_a_death_is_told_with_the_change_of_state(tmp_path: Path, action: str, why: str) -> None:
    async with serving(tmp_path) as role:
        await ask(role.worker, f"{action}@request counter={tmp_path / 'counter'} times=1")
        assert why in await role.until(WorkerState.BACKOFF)
        states = [state for state, _ in role.states]
        assert states[1:] == [WorkerState.READY, WorkerState.BACKOFF, WorkerState.STARTING, WorkerState.READY]


async def test_a_request_that_kills_its_worker_twice_fails_and_does_not_run_a_third_time(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    async with serving(tmp_path) as role:
        with pytest.raises(WorkerLostError, match="2 times"):
            await ask(role.worker, f"kill@stream counter={counter}")
        assert counter.stat().st_size == 2
        assert text_of(await ask(role.worker, "- Alive again.")) == "Alive again."


async def test_a_lost_embedding_runs_once_more_and_the_asker_never_notices(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        vectors = await role.worker.embed([f"kill@request counter={tmp_path / 'counter'} times=1"])
        assert vectors.shape == (1, 384)
        assert role.worker.restarts == 1


async def test_all_unfinished_requests_run_again_on_the_next_process(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        await role.until(WorkerState.READY)
        asked = [asyncio.create_task(ask(role.worker, "pause=0.1 tokens=4")) for _ in range(4)]
        await asyncio.sleep(0)
        assert role.worker.pid is not None
        os.kill(role.worker.pid, signal.SIGKILL)
        for items in await asyncio.gather(*asked):
            assert items.count(Lost()) == 1
            assert text_of(items[items.index(Lost()) :]) == "word0 word1 word2 word3"


async def test_a_request_that_was_never_sent_is_not_told_it_was_lost(tmp_path: Path, say: Say) -> None:
    say(f"exit@start counter={tmp_path / 'counter'} times=2")
    async with serving(tmp_path) as role:
        items = await ask(role.worker, "- Fine.")
        assert Lost() not in items
        assert role.worker.restarts == 2


async def test_a_request_made_while_a_dead_worker_is_cleared_away_is_answered(tmp_path: Path, say: Say) -> None:
    """The process has hung up but its end is still awaited: there is nobody to send to, and the state is ready."""
    say("deaf")
    async with serving(tmp_path, stalled=60.0) as role:
        await role.until(WorkerState.READY)
        first = asyncio.create_task(ask(role.worker, f"garbage@request counter={tmp_path / 'counter'} times=1"))
        await eventually(lambda: role.worker.pid is None)
        say("")
        assert role.worker.state is WorkerState.READY
        assert text_of(await ask(role.worker, "- Not forgotten.")) == "Not forgotten."
        await first


async def test_a_crash_loop_is_told_to_askers_and_is_over_when_the_obstacle_is_gone(tmp_path: Path, say: Say) -> None:
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    say(f"exit@start while={obstacle}")
    async with serving(tmp_path) as role:
        with pytest.raises(WorkerUnavailableError, match="out of luck"):
            await ask(role.worker, "anybody?")
        with pytest.raises(WorkerUnavailableError):
            await ask(role.worker, "still nobody?")
        obstacle.unlink()
        await role.until(WorkerState.READY)
        assert text_of(await ask(role.worker, "- Here I am.")) == "Here I am."
        assert role.worker._failures == 0


async def test_pauses_between_restarts_grow(tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def pause(failures: int, **_: float) -> float:
        asked.append(failures)
        return 0.0

    monkeypatch.setattr(worker_module, "pause_seconds", pause)
    say(f"kill@start counter={tmp_path / 'counter'} times=3")
    async with serving(tmp_path) as role:
        await role.until(WorkerState.READY)
        assert asked == [1, 2, 3]
        await ask(role.worker, f"kill@stream counter={tmp_path / 'other'} times=1")
        assert asked == [1, 2, 3, 1], "a worker that served starts from the shortest pause"


async def test_a_command_that_is_not_there_is_a_named_error_and_not_the_end(tmp_path: Path) -> None:
    role = Role(tmp_path)
    role.worker._command = (str(tmp_path / "missing"),)
    role.worker.start()
    try:
        with pytest.raises(WorkerUnavailableError, match="cannot be started"):
            await ask(role.worker, "anybody?")
        role.worker._command = FAKE
        await role.until(WorkerState.READY)
    finally:
        await role.worker.stop()


async def test_settled_returns_after_the_first_start_has_failed(tmp_path: Path, say: Say) -> None:
    say("exit@start")
    async with serving(tmp_path) as role, asyncio.timeout(LONGEST_SECONDS):
        await role.worker.settled()
        assert role.worker.state is not WorkerState.READY


# --- a worker that hangs ---------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["request", "stream"])
async def test_a_worker_silent_under_a_request_is_killed_and_the_request_runs_again(
    tmp_path: Path, moment: str
) -> None:
    async with serving(tmp_path, stalled=0.5) as role:
        await role.until(WorkerState.READY)
        items = await ask(role.worker, f"hang@{moment} counter={tmp_path / 'counter'} times=1 tokens=2")
        assert text_of(items[items.index(Lost()) :]) == "word0 word1"
        assert "made no progress for" in await role.until(WorkerState.BACKOFF)


async def test_a_worker_that_computes_for_long_without_a_word_is_left_to_work(tmp_path: Path) -> None:
    async with serving(tmp_path, stalled=0.2) as role:
        await role.until(WorkerState.READY)
        assert text_of(await ask(role.worker, "compute@request compute=1.5 tokens=1")) == "word0"
        assert role.worker.restarts == 0


async def test_a_worker_that_computes_for_ever_is_killed_and_the_request_runs_again(tmp_path: Path) -> None:
    async with serving(tmp_path, stalled=0.1) as role:
        await role.until(WorkerState.READY)
        items = await ask(role.worker, f"compute@request counter={tmp_path / 'counter'} times=1 tokens=2")
        assert text_of(items[items.index(Lost()) :]) == "word0 word1"
        assert "made no progress for" in await role.until(WorkerState.BACKOFF)


async def test_a_hung_worker_does_not_live_on_the_requests_it_is_sent(tmp_path: Path) -> None:
    async with serving(tmp_path, stalled=0.5) as role:
        await role.until(WorkerState.READY)
        hung = asyncio.create_task(ask(role.worker, "hang@request"))
        await asyncio.sleep(0)
        while not hung.done():
            with contextlib.suppress(DeadlineError):
                await ask(role.worker, "and now?", deadline=0.05)
        with pytest.raises(WorkerLostError):
            await hung


async def test_a_hung_worker_that_no_longer_reads_is_killed_under_megabytes_of_requests(tmp_path: Path) -> None:
    async with serving(tmp_path, stalled=0.5) as role:
        await role.until(WorkerState.READY)
        hang = f"hang@request counter={tmp_path / 'counter'} times=1"
        hung = asyncio.create_task(ask(role.worker, hang))
        await asyncio.sleep(0)
        texts = ["x" * 1_000_000] * 4
        vectors = await asyncio.wait_for(role.worker.embed(texts), LONGEST_SECONDS)
        assert vectors.shape == (4, 384)
        await hung


async def test_silence_is_right_while_nothing_is_asked(tmp_path: Path) -> None:
    async with serving(tmp_path, stalled=0.2) as role:
        await ask(role.worker, "- One.")
        await asyncio.sleep(0.5)  # longer than the limit: nothing may happen, so there is no event to wait for
        assert text_of(await ask(role.worker, "- Two.")) == "Two."
        assert role.worker.restarts == 0


async def test_silence_is_right_again_after_the_only_asker_went_away(tmp_path: Path) -> None:
    async with serving(tmp_path, stalled=0.3) as role:
        await role.until(WorkerState.READY)
        with pytest.raises(DeadlineError):
            await ask(role.worker, "pause=30 tokens=1", deadline=0.1)
        await asyncio.sleep(0.6)
        assert role.worker.restarts == 0


async def test_a_slow_worker_that_says_it_is_alive_is_left_to_work(tmp_path: Path, say: Say) -> None:
    say("alive=0.1")
    async with serving(tmp_path, stalled=0.5) as role:
        assert text_of(await ask(role.worker, "pause=1.2 tokens=1")) == "word0"
        assert role.worker.restarts == 0


async def test_a_worker_that_never_becomes_ready_is_killed_after_the_load_limit(tmp_path: Path, say: Say) -> None:
    say(f"hang@start counter={tmp_path / 'counter'} times=1")
    async with serving(tmp_path, load=2.0) as role:
        assert text_of(await ask(role.worker, "- At last.")) == "At last."
        assert "did not become ready: signal 9" in await role.until(WorkerState.BACKOFF)


# --- a model that is not kept warm -----------------------------------------------------------------

AT_ONCE = KeepWarm("idle", 0.0)
SOON = KeepWarm("idle", 0.05)
ON_DEMAND = KeepWarm("demand", 60.0)


async def test_a_model_nobody_asks_is_unloaded_and_its_process_is_gone(tmp_path: Path) -> None:
    async with serving(tmp_path, keep_warm=SOON) as role:
        await role.until(WorkerState.READY)
        pid = role.worker.pid
        assert await role.until(WorkerState.UNLOADED) == "nobody asked for 0.05 s"
        assert ended(pid)
        assert role.worker.pid is None
        assert role.worker.restarts == 0


async def test_the_next_request_loads_an_unloaded_model_again(tmp_path: Path) -> None:
    async with serving(tmp_path, keep_warm=SOON) as role:
        for times in range(1, 4):
            await role.until(WorkerState.UNLOADED, times=times)
            items = await ask(role.worker, "- Awake again.")
            assert text_of(items) == "Awake again."
            assert Lost() not in items
        await role.until(WorkerState.UNLOADED, times=4)
        life = [WorkerState.STARTING, WorkerState.READY, WorkerState.UNLOADED]
        assert [state for state, _ in role.states] == life * 4


async def test_a_model_on_demand_is_not_loaded_before_the_first_request(tmp_path: Path) -> None:
    async with serving(tmp_path, keep_warm=ON_DEMAND) as role:
        await asyncio.wait_for(role.worker.settled(), LONGEST_SECONDS)
        assert role.worker.state is WorkerState.UNLOADED
        assert psutil.Process().children() == []
        answers = await asyncio.gather(*(ask(role.worker, f"- Fact {number}.") for number in range(4)))
        assert [text_of(items) for items in answers] == [f"Fact {number}." for number in range(4)]
        assert [state for state, _ in role.states] == [WorkerState.UNLOADED, WorkerState.STARTING, WorkerState.READY]


async def test_a_model_is_not_unloaded_under_a_request_however_long_it_takes(tmp_path: Path) -> None:
    async with serving(tmp_path, keep_warm=SOON) as role:
        items = await ask(role.worker, "pause=0.1 tokens=4")
        assert text_of(items) == "word0 word1 word2 word3"
        assert Lost() not in items
        assert [state for state, _ in role.states] == [WorkerState.STARTING, WorkerState.READY]


async def test_requests_made_at_every_moment_of_unloading_and_loading_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[asyncio.Task[list[Piece | Lost | Finished]]] = []
    moments = 12
    async with serving(tmp_path, keep_warm=AT_ONCE) as role:
        unload, record = Worker._unload, role.worker._on_state

        def ask_now() -> None:
            if len(asked) < moments:
                asked.append(asyncio.create_task(ask(role.worker, f"- Fact {len(asked)}.")))

        def when_unloading(worker: Worker, process: WorkerProcess) -> None:
            unload(worker, process)
            ask_now()

        def when_changed(state: WorkerState, why: str) -> None:
            record(state, why)
            ask_now()

        monkeypatch.setattr(Worker, "_unload", when_unloading)
        role.worker._on_state = when_changed
        await eventually(lambda: len(asked) == moments)
        answers = await asyncio.gather(*asked)
        assert [text_of(items) for items in answers] == [f"Fact {number}." for number in range(moments)]
        assert not any(Lost() in items for items in answers)
        assert role.worker.unfinished == role.worker.restarts == 0
        assert [state for state, _ in role.states].count(WorkerState.UNLOADED) >= 2


async def test_a_request_made_while_an_idle_process_takes_its_time_to_end_is_answered_by_the_next(
    tmp_path: Path, say: Say
) -> None:
    say("deaf")
    async with serving(tmp_path, keep_warm=SOON) as role:
        await role.until(WorkerState.READY)
        pid = role.worker.pid
        await eventually(lambda: role.worker.pid is None)
        say("")
        items = await ask(role.worker, "- By the next.")
        assert text_of(items) == "By the next."
        assert Lost() not in items
        assert ended(pid)


async def test_a_model_on_demand_that_cannot_be_loaded_says_so_and_recovers(tmp_path: Path, say: Say) -> None:
    say(f"exit@start counter={tmp_path / 'counter'} times=4")
    async with serving(tmp_path, keep_warm=KeepWarm("demand", 0.05)) as role:
        with pytest.raises(WorkerUnavailableError, match="out of luck"):
            await ask(role.worker, "anybody?")
        await role.until(WorkerState.UNLOADED, times=2)
        assert text_of(await ask(role.worker, "- Forgiven.")) == "Forgiven."


async def test_a_deadline_holds_while_a_model_is_loaded_on_demand(tmp_path: Path, say: Say) -> None:
    say("hang@start")
    async with serving(tmp_path, keep_warm=ON_DEMAND) as role:
        with pytest.raises(DeadlineError):
            await ask(role.worker, "now", deadline=0.2)
        with pytest.raises(DeadlineError):
            await role.worker.embed(["now"], deadline_seconds=0.2)
        assert role.worker.unfinished == 0


async def test_an_unloaded_worker_stops_and_starts_again(tmp_path: Path) -> None:
    async with serving(tmp_path, keep_warm=ON_DEMAND) as role:
        await asyncio.sleep(0)
        await role.worker.stop()
        assert [state for state, _ in role.states][-2:] == [WorkerState.STOPPING, WorkerState.STOPPED]
        role.worker.start()
        assert text_of(await ask(role.worker, "- Again.")) == "Again."


# --- stopping --------------------------------------------------------------------------------------


async def test_stop_fails_what_is_unfinished_by_name_and_ends_the_process(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        await role.until(WorkerState.READY)
        asked = [asyncio.create_task(ask(role.worker, "pause=30 tokens=2")) for _ in range(3)]
        await asyncio.sleep(0)
        pid = role.worker.pid
        await role.worker.stop()
        for result in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(result, WorkerUnavailableError)
        assert ended(pid)
        with pytest.raises(WorkerUnavailableError):
            await ask(role.worker, "after the end")


@pytest.mark.parametrize("words", ["", "hang@start", "exit@start"], ids=["loading", "hanging", "crashing"])
async def test_stop_at_any_moment_of_a_start_leaves_no_process(tmp_path: Path, say: Say, words: str) -> None:
    say(words)
    me = psutil.Process()
    for delay in (None, 0.0, 0.005, 0.02, 0.05, 0.1, 0.15, 0.2):
        async with serving(tmp_path) as role:
            if delay is not None:
                await asyncio.sleep(delay)
        assert role.worker.state is WorkerState.STOPPED
        assert me.children() == []
        assert not role.socket_path.exists()


async def test_stop_ends_a_worker_that_ignores_hanging_up(tmp_path: Path, say: Say) -> None:
    say("deaf")
    async with serving(tmp_path) as role:
        await role.until(WorkerState.READY)
        pid = role.worker.pid
    assert ended(pid)


async def test_stop_while_a_stalled_process_is_being_killed_waits_for_its_end(tmp_path: Path) -> None:
    async with serving(tmp_path, stalled=0.2) as role:
        await role.until(WorkerState.READY)
        pid = role.worker.pid
        hung = asyncio.create_task(ask(role.worker, "hang@request"))
        await eventually(lambda: role.worker.pid is None)
        await role.worker.stop()
        assert ended(pid)
        with pytest.raises(WorkerError):
            await hung


async def test_stop_may_be_called_twice_and_at_once_and_before_a_start(tmp_path: Path) -> None:
    role = Role(tmp_path)
    await role.worker.stop()
    role.worker.start()
    await role.until(WorkerState.READY)
    await asyncio.gather(role.worker.stop(), role.worker.stop(), role.worker.stop())
    await role.worker.stop()
    assert [state for state, _ in role.states][-2:] == [WorkerState.STOPPING, WorkerState.STOPPED]


async def test_a_stopped_worker_can_be_started_again(tmp_path: Path) -> None:
    role = Role(tmp_path)
    for _ in range(2):
        role.worker.start()
        assert text_of(await ask(role.worker, "- Again.")) == "Again."
        await role.worker.stop()


async def _resources() -> tuple[int, list[str], list[psutil.Process]]:
    """Open descriptors, threads and children, once asyncio's threads that waited for a child have ended."""
    await eventually(lambda: not any("waitpid" in thread.name for thread in threading.enumerate()))
    me = psutil.Process()
    return me.num_fds(), sorted(thread.name for thread in threading.enumerate()), me.children(recursive=True)


async def test_fifty_starts_and_stops_leak_no_descriptor_thread_or_child(tmp_path: Path) -> None:
    async with serving(tmp_path) as role:
        await ask(role.worker, "- Warm.")
    before = await _resources()
    for _ in range(50):
        async with serving(tmp_path) as role:
            await ask(role.worker, "- Warm.")
    assert await _resources() == before


# --- the socket ------------------------------------------------------------------------------------


async def test_the_socket_is_for_its_owner_alone_and_gone_when_the_worker_is_there(tmp_path: Path, say: Say) -> None:
    say("hang@start")
    role = Role(tmp_path)
    role.worker.start()
    try:
        await eventually(role.socket_path.exists)
        assert stat.S_IMODE(role.socket_path.stat().st_mode) == 0o600
        assert stat.S_IMODE(role.socket_path.parent.stat().st_mode) == 0o700
    finally:
        await role.worker.stop()
    say("")
    async with serving(tmp_path) as other:
        await other.until(WorkerState.READY)
        assert not other.socket_path.exists()


async def test_a_stranger_at_the_socket_is_turned_away_and_the_worker_still_gets_in(tmp_path: Path) -> None:
    """The child is held back until strangers, this process, have been at the socket before it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    role = Role(tmp_path)
    role.worker._command = ("/bin/sh", "-c", f'read _ < {gate}; exec "$@"', "sh", *FAKE)
    role.worker.start()
    try:
        await eventually(role.socket_path.exists)
        for _ in range(3):
            reader, writer = await asyncio.open_unix_connection(role.socket_path)
            writer.write(b"\x00\x00\x00\x00 let me in")
            assert await asyncio.wait_for(_all_of(reader), LONGEST_SECONDS) == b""
            writer.close()
        await asyncio.to_thread(gate.write_text, "go\n")
        assert text_of(await ask(role.worker, "- The right one.")) == "The right one."
        assert role.worker.restarts == 0
    finally:
        await role.worker.stop()


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def test_a_socket_left_behind_by_a_killed_daemon_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "run" / "w.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert path.exists()
    async with serving(tmp_path) as role:
        assert text_of(await ask(role.worker, "- Fine.")) == "Fine."


# --- the daemon's death ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["", "deaf"], ids=["listening", "deaf"])
def test_the_worker_dies_with_a_killed_daemon(tmp_path: Path, say: Say, words: str) -> None:
    say(words)
    daemon = subprocess.Popen(
        [sys.executable, str(PARENT), str(tmp_path / "w.sock"), "none", *FAKE], stdout=subprocess.PIPE, text=True
    )
    with daemon:
        assert daemon.stdout is not None
        lines = iter(daemon.stdout.readline, "")
        found = next(match for line in lines if (match := re.match(r"pid (\d+)", line)))
        daemon.kill()
    asyncio.run(eventually(lambda: ended(int(found[1]))))
