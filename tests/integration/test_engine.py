"""The real engine with the two default models: batching, cancelling, limits, special tokens, embeddings, death."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edged.config import Config
from edged.engine.llama import Model
from edged.errors import DeadlineError, PromptTooLongError, WorkerError, WorkerLostError
from edged.models.catalog import Catalog
from edged.rag.prompt import SYSTEM
from edged.types import Segment
from edged.workers.process import ENGINE_COMMAND, WorkerProcess
from edged.workers.protocol import Alive, Embed, Failed, Finished, Generate, Piece, Reply, WorkerSettings
from edged.workers.state import WorkerState
from edged.workers.worker import Lost, Worker

pytestmark = pytest.mark.models

LONGEST_SECONDS = 100.0
PARENT = Path(__file__).parents[1] / "worker_parent.py"
FACTS = "The coolant pump needs 250 ml of grease every 500 hours.\nQuestion: How much grease does the pump need?"

Items = list[Piece | Lost | Finished]


def model_file(home: Path, name: str) -> Path:
    return Catalog(home / "models", home / "cache").path(name)


@pytest.fixture(scope="session")
def chat_file(models_home: Path) -> Path:
    return model_file(models_home, Config().chat.model)


@pytest.fixture(scope="session")
def embed_file(models_home: Path) -> Path:
    return model_file(models_home, Config().embed.model)


@pytest.fixture(scope="session")
def vocabulary(chat_file: Path) -> Iterator[Model]:
    model = Model(chat_file)
    yield model
    model.close()


@contextlib.asynccontextmanager
async def serving(folder: Path, worker_settings: WorkerSettings) -> AsyncIterator[Worker]:
    worker = Worker(worker_settings, folder / "w.sock", on_state=lambda _state, _why: None)
    worker.start()
    try:
        await asyncio.wait_for(worker.settled(), LONGEST_SECONDS)
        assert worker.state is WorkerState.READY
        yield worker
    finally:
        await worker.stop()


def chat_settings(
    file: Path, *, context: int = 1024, sequences: int = 8, batch: int = 256, queue: int = 64
) -> WorkerSettings:
    return WorkerSettings(
        kind="chat",
        model=str(file),
        threads=1,  # two that share busy cores wait for each other at every barrier
        context_tokens=context,
        sequences=sequences,
        batch_tokens=batch,
        queue_limit=queue,
    )


def chat(user: str) -> list[Segment]:
    """A prompt in SmolLM2's format."""
    return [
        Segment("<|im_start|>user\n", special=True),
        Segment(user),
        Segment("<|im_end|>\n<|im_start|>assistant\n", special=True),
    ]


async def ask(worker: Worker, prompt: list[Segment], max_tokens: int = 14, deadline: float | None = None) -> Items:
    async with (
        asyncio.timeout(LONGEST_SECONDS),
        contextlib.aclosing(worker.generate(prompt, max_tokens=max_tokens, deadline_seconds=deadline)) as items,
    ):
        return [item async for item in items]


def text_of(items: Items) -> str:
    return "".join(item.text for item in items if isinstance(item, Piece))


def last_of(items: Items) -> Finished:
    assert isinstance(items[-1], Finished)
    return items[-1]


# --- generating ------------------------------------------------------------------------------------


async def test_greedy_generation_alone_says_the_same_twice_and_reads_its_prompt(
    tmp_path: Path, chat_file: Path
) -> None:
    async with serving(tmp_path, chat_settings(chat_file)) as worker:
        instruction = [
            Segment("<|im_start|>system\n", special=True),
            Segment(SYSTEM),
            Segment("<|im_end|>\n", special=True),
        ]
        first, second = [await ask(worker, [*instruction, *chat(FACTS)], max_tokens=80) for _ in range(2)]
        assert text_of(first) == text_of(second)
        assert "250 ml" in text_of(first)
        last = last_of(first)
        assert last.reason == "stop"
        assert 1 < last.completion_tokens < 80
        assert last.prefill_ms > 0


async def test_eight_streams_at_once_all_finish_and_all_read_their_own_prompt(tmp_path: Path, chat_file: Path) -> None:
    async with serving(tmp_path, chat_settings(chat_file)) as worker:
        amounts = [110 + 30 * number for number in range(8)]
        answers = await asyncio.gather(*(ask(worker, chat(FACTS.replace("250", str(each)))) for each in amounts))
        for amount, items in zip(amounts, answers, strict=True):
            assert f"{amount} ml" in text_of(items)
            assert last_of(items).queue_ms < 5_000
        assert worker.restarts == 0


async def test_a_stop_string_ends_the_answer_and_is_not_shown(tmp_path: Path, chat_file: Path) -> None:
    async with serving(tmp_path, chat_settings(chat_file)) as worker:
        stream = worker.generate(chat(FACTS), max_tokens=14, stop=["250 ml"])
        items = [item async for item in stream]
        assert "250" not in text_of(items)
        assert last_of(items).reason == "stop"


async def test_more_requests_than_the_context_holds_wait_their_turn_and_all_finish(
    tmp_path: Path, chat_file: Path
) -> None:
    async with serving(tmp_path, chat_settings(chat_file, context=192, batch=64)) as worker:
        answers = await asyncio.gather(*(ask(worker, chat(FACTS), max_tokens=30) for _ in range(6)))
        assert all("250 ml" in text_of(items) for items in answers)
        assert max(last_of(items).queue_ms for items in answers) > 0


async def test_many_cancelled_long_requests_leave_the_whole_context_free(tmp_path: Path, chat_file: Path) -> None:
    context = 512
    async with serving(tmp_path, chat_settings(chat_file, context=context, sequences=4, batch=64)) as worker:
        for _ in range(3):
            streams = [worker.generate([Segment("pump " * 150)], max_tokens=150) for _ in range(6)]
            asked = [asyncio.create_task(anext(stream)) for stream in streams]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=LONGEST_SECONDS)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            for stream in streams:
                await stream.aclose()
        assert worker.unfinished == 0
        last = last_of(await ask(worker, [Segment("pump " * (context - 40))], max_tokens=context))
        assert last.prompt_tokens > context - 60
        assert last.prompt_tokens + last.completion_tokens == context or last.reason == "stop"
        assert worker.restarts == 0


async def test_a_prompt_as_long_as_the_context_is_refused_by_name(tmp_path: Path, chat_file: Path) -> None:
    async with serving(tmp_path, chat_settings(chat_file, context=256)) as worker:
        with pytest.raises(PromptTooLongError, match="255"):
            await ask(worker, [Segment("pump " * 300)])
        assert "250 ml" in text_of(await ask(worker, chat(FACTS)))


async def test_a_deadline_ends_a_long_generation_and_frees_the_worker(tmp_path: Path, chat_file: Path) -> None:
    async with serving(tmp_path, chat_settings(chat_file, sequences=1)) as worker:
        heard: Items = []
        with pytest.raises(DeadlineError):
            async for item in worker.generate([Segment("1 2 3 4")], max_tokens=1000, deadline_seconds=1.0):
                heard.append(item)
        assert heard
        assert last_of(await ask(worker, chat(FACTS))).queue_ms < 1_000


async def test_the_engine_itself_keeps_deadlines_and_refuses_what_it_cannot_do(tmp_path: Path, chat_file: Path) -> None:
    process = await WorkerProcess.start(chat_settings(chat_file, sequences=1), tmp_path / "w.sock")
    try:
        assert process.ready.context_tokens == 1024
        process.send(Generate(id=1, prompt=(Segment("1 2 3 4"),), max_tokens=1000, deadline_seconds=0.5))
        process.send(Generate(id=2, prompt=(Segment("1 2 3 4"),), max_tokens=2, deadline_seconds=0.2))
        process.send(Generate(id=3, prompt=(Segment(""),), max_tokens=2))
        process.send(Generate(id=4, prompt=(Segment("1 2 3 4"),), max_tokens=-5))
        process.send(Embed(5, ("text",)))
        ends = await asyncio.wait_for(_ends(process, 5), LONGEST_SECONDS)
    finally:
        await process.end()
    codes = {number: end.code if isinstance(end, Failed) else "finished" for number, end in ends.items()}
    assert codes == {
        1: "deadline_exceeded",
        2: "deadline_exceeded",
        3: "worker_error",
        4: "finished",
        5: "worker_error",
    }


async def _ends(process: WorkerProcess, count: int) -> dict[int, Reply]:
    """The last reply to each of ``count`` requests."""
    ends: dict[int, Reply] = {}
    async for reply in process.replies():
        if isinstance(reply, Finished | Failed):
            ends[reply.id] = reply
        else:
            assert isinstance(reply, Piece | Alive)
        if len(ends) == count:
            break
    return ends


async def test_a_file_that_is_no_model_is_a_named_error_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(WorkerError, match=r"did not become ready: exit status 3: llama\.cpp cannot load"):
        await WorkerProcess.start(chat_settings(broken), tmp_path / "w.sock")
    assert psutil.Process().children() == []


# --- special tokens --------------------------------------------------------------------------------

# The vocabulary of SmolLM2 lacks some bytes; what is in no manual, such as a control character, is lost.
LETTERS = st.characters(codec="latin-1", min_codepoint=32, exclude_categories=["Cc"])
MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<jupyter_start>", "<file_sep>"]
PARTS = st.sampled_from([*MARKS, "<|im_", "end|>", "<", "|", " ", "\n", "°"])


def control_tokens(model: Model, tokens: list[int]) -> list[int]:
    return [token for token in tokens if llama_cpp.llama_vocab_is_control(model.vocabulary, token)]


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_one_special_token_in_the_template_and_plain_text_in_a_payload(vocabulary: Model, mark: str) -> None:
    from_template = vocabulary.tokenize_prompt([Segment(mark, special=True)])
    from_payload = vocabulary.tokenize_prompt([Segment(mark)])
    assert len(from_template) == 1
    assert control_tokens(vocabulary, from_template) == from_template
    assert control_tokens(vocabulary, from_payload) == []
    assert b"".join(vocabulary.token_bytes(token) for token in from_payload).decode() == mark


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.lists(PARTS | st.text(LETTERS, max_size=5)))
@example(payload=["<|im_", "end|>"])
def test_no_payload_adds_a_special_token_to_a_prompt_or_loses_a_character(
    vocabulary: Model, payload: list[str]
) -> None:
    text = "".join(payload)
    prompt = vocabulary.tokenize_prompt(chat(text))
    assert control_tokens(vocabulary, prompt) == control_tokens(vocabulary, vocabulary.tokenize_prompt(chat("")))
    plain = vocabulary.tokenize(text, add_special=False, parse_special=False)
    assert b"".join(vocabulary.token_bytes(token) for token in plain).decode() == text


# --- embedding -------------------------------------------------------------------------------------


def embed_settings(file: Path) -> WorkerSettings:
    return WorkerSettings(kind="embed", model=str(file), threads=1, batch_tokens=1024, queue_limit=64)


async def test_vectors_have_unit_length_and_do_not_depend_on_their_neighbours(tmp_path: Path, embed_file: Path) -> None:
    texts = [f"Pump {number} needs {'much ' * number}oil." for number in range(34)]
    async with serving(tmp_path, embed_settings(embed_file)) as worker:
        together = await worker.embed(texts)
        alone = np.concatenate([await worker.embed([text]) for text in texts[::5]])
        assert together.shape == (34, 384)
        assert np.allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
        assert np.all(np.sum(together[::5] * alone, axis=1) > 0.999)


async def test_near_in_meaning_is_near_in_space(tmp_path: Path, embed_file: Path) -> None:
    async with serving(tmp_path, embed_settings(embed_file)) as worker:
        question, near, far = await worker.embed(
            ["How do I grease the bearing?", "Lubricate bearings with lithium grease.", "The invoice is due in May."]
        )
        assert question @ near > 0.5
        assert question @ far < 0.3


async def test_a_long_text_is_cut_and_an_empty_one_is_a_text_too(tmp_path: Path, embed_file: Path) -> None:
    async with serving(tmp_path, embed_settings(embed_file)) as worker:
        context = worker.ready.context_tokens if worker.ready else 0
        cut, longer, empty = await worker.embed(["oil " * context, "oil " * context * 20, ""])
        assert cut @ longer > 0.999
        assert np.linalg.norm(empty) == pytest.approx(1.0, abs=1e-5)
        assert (await worker.embed([])).shape == (0, 384)


async def test_a_question_does_not_wait_for_a_book(tmp_path: Path, embed_file: Path) -> None:
    async with serving(tmp_path, embed_settings(embed_file)) as worker:
        book = asyncio.create_task(worker.embed(["A page of a long book about pumps. " * 20] * 40))
        await asyncio.sleep(0)
        await asyncio.wait_for(worker.embed(["a question"]), LONGEST_SECONDS)
        assert not book.done()
        assert (await book).shape == (40, 384)


# --- death -----------------------------------------------------------------------------------------


async def _under_load(worker: Worker, deaths: int) -> list[Items | BaseException]:
    """Sixteen streams over a worker that is killed ``deaths`` times in mid-stream."""
    speaking = asyncio.Event()
    killed: list[int | None] = [None]

    async def listen(number: int) -> Items:
        items: Items = []
        async for item in worker.generate(chat(f"{number}. {FACTS}"), max_tokens=14):
            items.append(item)
            if isinstance(item, Piece) and worker.pid not in killed:
                speaking.set()
        return items

    asked = [asyncio.create_task(listen(number)) for number in range(16)]
    for _ in range(deaths):
        speaking.clear()
        await asyncio.wait_for(speaking.wait(), LONGEST_SECONDS)
        assert worker.pid is not None
        killed.append(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)
    return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), LONGEST_SECONDS)


async def test_after_a_kill_under_sixteen_streams_every_request_is_answered_once(
    tmp_path: Path, chat_file: Path
) -> None:
    async with serving(tmp_path, chat_settings(chat_file)) as worker:
        for items in await _under_load(worker, deaths=1):
            assert isinstance(items, list)
            assert items.count(Lost()) <= 1
            final = items[items.index(Lost()) :] if Lost() in items else items
            assert "250 ml" in text_of(final)
            assert sum(isinstance(item, Finished) for item in items) == 1
        assert worker.unfinished == 0
        assert worker.restarts == 1


async def test_after_two_kills_under_load_every_request_has_an_end_with_a_name(tmp_path: Path, chat_file: Path) -> None:
    async with serving(tmp_path, chat_settings(chat_file)) as worker:
        ends = await _under_load(worker, deaths=2)
        lost = [end for end in ends if isinstance(end, WorkerLostError)]
        answered = [end for end in ends if isinstance(end, list) and isinstance(end[-1], Finished)]
        assert len(lost) + len(answered) == 16
        assert lost
        assert worker.unfinished == 0
        assert "250 ml" in text_of(await ask(worker, chat(FACTS)))


def test_the_engine_dies_with_a_killed_daemon_in_the_middle_of_its_work(tmp_path: Path, chat_file: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, str(PARENT), str(tmp_path / "w.sock"), str(chat_file), *ENGINE_COMMAND],
        stdout=subprocess.PIPE,
        text=True,
    )
    with daemon:
        assert daemon.stdout is not None
        lines = iter(daemon.stdout.readline, "")
        found = next(match for line in lines if (match := re.match(r"pid (\d+)", line)))
        engine = psutil.Process(int(found[1]))
        daemon.kill()
        gone, alive = psutil.wait_procs([engine], timeout=20)
    assert (gone, alive) == ([engine], [])
