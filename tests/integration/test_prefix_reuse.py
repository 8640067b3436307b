"""Prompts computed once: the same tokens come out, bit for bit, and what cannot be trusted is computed again."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from edged.config import Config
from edged.engine.chat import ChatEngine
from edged.engine.llama import Model, quiet
from edged.engine.prefix import token_array
from edged.models.catalog import Catalog
from edged.types import Priority, Segment
from edged.workers.protocol import Cancel, Failed, Finished, Generate, Piece, Reply, Tune, WorkerSettings

pytestmark = pytest.mark.models

SYSTEM = "Answer the question from the facts given. Use their own words, numbers and units. " * 3
PRIORITIES: tuple[Priority, ...] = ("alarm", "interactive", "batch")
QUESTIONS = ("What is a pump?", "Why do bearings fail?", "How hot may the oil get before the alarm is raised?")


@pytest.fixture(scope="module")
def model(models_home: Path) -> Iterator[Model]:
    quiet()
    model = Model(Catalog(models_home / "models", models_home / "cache").path(Config().chat.model))
    yield model
    model.close()


class Engine:
    """A chat engine in this process, driven to the end of each request."""

    def __init__(self, model: Model, *, cache: int = 64 << 20, snapshots: Path | None = None, **changes: Any) -> None:
        self.replies: list[Reply] = []
        self.settings = WorkerSettings(
            kind="chat",
            model="",
            threads=1,
            prefix_cache_bytes=cache,
            snapshots=str(snapshots or ""),
            identity="a model",
            **{"context_tokens": 1024, "sequences": 4, **changes},
        )
        self.chat = ChatEngine(model, self.settings, self.replies.append)

    def ask(self, *requests: Generate) -> list[tuple[str, Finished]]:
        self.replies.clear()
        for request in requests:
            self.chat.handle(request, time.monotonic())
        while self.chat.busy:
            self.chat.step(time.monotonic)
        ends = {reply.id: reply for reply in self.replies if isinstance(reply, Finished)}
        return [(self._text(request.id), ends[request.id]) for request in requests]

    def _text(self, number: int) -> str:
        return "".join(reply.text for reply in self.replies if isinstance(reply, Piece) and reply.id == number)

    def logits(self) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        """Of the last step's last output."""
        import llama_cpp

        size = self.chat._model.vocabulary_tokens
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.chat._context, -1), (size,)).copy()

    def close(self) -> None:
        self.chat.close()


@pytest.fixture
def engines(model: Model) -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for each in made:
        each.close()


def request(number: int, question: str, *, system: str = SYSTEM, tokens: int = 12, keep: bool = False) -> Generate:
    prompt = (
        Segment("<|im_start|>system\n", special=True),
        Segment(system),
        Segment("<|im_end|>\n<|im_start|>user\n", special=True),
        Segment(question),
        Segment("<|im_end|>\n<|im_start|>assistant\n", special=True),
    )
    return Generate(id=number, prompt=prompt, prefix_segments=3, max_tokens=tokens, keep=keep)


def test_with_reuse_the_same_text_and_the_same_logits_come_out_bit_for_bit(model: Model, engines: list[Engine]) -> None:
    for question in QUESTIONS:
        cold, warm = Engine(model, cache=0), Engine(model)
        engines += [cold, warm]
        warm.ask(request(1, "Something else entirely, and longer than the question that follows?"))
        ((expected, first),) = cold.ask(request(1, question))
        expected_logits = cold.logits()
        ((text, second),) = warm.ask(request(2, question))
        assert (first.cached_tokens, second.cached_tokens > 40) == (0, True)
        assert text == expected
        assert np.array_equal(warm.logits(), expected_logits)


def test_a_restarted_engine_has_the_prefix_from_disk_and_says_the_same(
    model: Model, engines: list[Engine], tmp_path: Path
) -> None:
    before = Engine(model, snapshots=tmp_path)
    engines.append(before)
    ((expected, _),) = before.ask(request(1, QUESTIONS[0]))
    wait_for_file(tmp_path)
    after = Engine(model, snapshots=tmp_path)
    engines.append(after)
    ((text, last),) = after.ask(request(1, QUESTIONS[0]))
    assert last.cached_tokens > 40
    assert text == expected


def wait_for_file(folder: Path) -> None:
    """The snapshot is written by a thread of its own."""
    deadline = time.monotonic() + 30
    while not list(folder.glob("*.kv")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_state_that_llama_cpp_does_not_take_is_dropped_and_computed_again(
    model: Model, engines: list[Engine], tmp_path: Path
) -> None:
    engine = Engine(model, snapshots=tmp_path)
    engines.append(engine)
    ((expected, _),) = engine.ask(request(1, QUESTIONS[0]))
    prefixes = engine.chat._prefixes
    prompt = engine.chat._model.tokenize_prompt(request(1, "").prompt[:3])
    length, state = prefixes.best(token_array([*prompt, 1]), len(prompt))
    assert state is not None
    prefixes.put(type(state)(state.tokens, state.data[: len(state.data) // 2], state.prompt_tokens))
    ((text, last),) = engine.ask(request(2, QUESTIONS[0]))
    assert length == len(prompt)
    assert last.cached_tokens == 0
    assert text == expected


def test_the_next_turn_of_a_kept_conversation_computes_only_what_is_new(model: Model, engines: list[Engine]) -> None:
    engine = Engine(model)
    engines.append(engine)
    ((answer, first),) = engine.ask(request(1, QUESTIONS[0], keep=True))
    turn = request(2, QUESTIONS[0])
    follow_up = Generate(
        id=2,
        prompt=(
            *turn.prompt,
            Segment(answer),
            Segment("<|im_end|>\n<|im_start|>user\n", special=True),
            Segment("Why?"),
        ),
        max_tokens=4,
    )
    ((_, second),) = engine.ask(follow_up)
    assert second.cached_tokens >= first.prompt_tokens + first.completion_tokens - 2


@pytest.mark.parametrize("apart", [False, True])
def test_many_requests_at_once_compute_their_common_prefix_once(
    model: Model, engines: list[Engine], apart: bool
) -> None:
    engine = Engine(model, kv_apart=apart)
    engines.append(engine)
    answers = engine.ask(*(request(number, f"Question {number}?") for number in range(1, 5)))
    cached = sorted(last.cached_tokens for _, last in answers)
    assert cached[0] == 0
    assert cached[1] > 40


def test_apart_each_sequence_has_its_part_of_the_context_and_a_longer_prompt_is_refused(
    model: Model, engines: list[Engine]
) -> None:
    apart, shared = Engine(model, kv_apart=True), Engine(model)
    engines += [apart, shared]
    ((_, last),) = apart.ask(request(1, QUESTIONS[2]))
    assert last.completion_tokens == 12
    for engine in (apart, shared):
        engine.replies.clear()
        engine.chat.handle(request(2, "pump " * 300), time.monotonic())
    (refusal,) = apart.replies
    assert isinstance(refusal, Failed)
    assert refusal.code == "prompt_too_long"
    assert "1 to 255" in refusal.message
    assert not shared.replies


def test_a_model_with_a_sliding_window_computes_every_prompt_whole(engines: list[Engine], models_home: Path) -> None:
    catalog = Catalog(models_home / "models", models_home / "cache")
    gemma = Model(catalog.pull("gemma3-270m"))
    assert not gemma.keeps_whole_states
    engine = Engine(gemma, context_tokens=512)
    answers = [engine.ask(request(1, QUESTIONS[0], tokens=4))[0] for _ in range(2)]
    engine.close()
    gemma.close()
    assert answers[0][0] == answers[1][0]
    assert answers[1][1].cached_tokens == 0


def test_any_interleaving_leaves_no_sequence_no_cell_and_no_request_behind(model: Model) -> None:
    class Machine(RuleBasedStateMachine):
        """Arrivals, cancellations, deadlines, tuning and steps, in any order."""

        @initialize(cache=st.sampled_from([0, 1 << 20, 32 << 20]), apart=st.booleans())
        def begin(self, cache: int, apart: bool) -> None:
            context: dict[str, Any] = {"context_tokens": 1024 if apart else 256, "kv_apart": apart}
            self.engine = Engine(model, cache=cache, batch_tokens=64, queue_limit=3, **context)
            self.numbers = itertools.count(1)
            self.now = 0.0

        @rule(
            words=st.integers(0, 60),
            longest=st.integers(1, 12),
            system=st.sampled_from(["", "Be brief and say what the facts say, in their words. ", SYSTEM]),
            patience=st.none() | st.floats(0, 5),
            keep=st.booleans(),
        )
        def submit(self, words: int, longest: int, system: str, patience: float | None, keep: bool) -> None:
            asked = request(next(self.numbers), "pump " * words, system=system, tokens=longest, keep=keep)
            given = Generate(
                id=asked.id,
                prompt=asked.prompt,
                prefix_segments=3,
                max_tokens=longest,
                keep=keep,
                priority=PRIORITIES[asked.id % 3],
                deadline_seconds=patience,
            )
            self.engine.chat.handle(given, self.now)

        @rule(back=st.integers(0, 5))
        def cancel(self, back: int) -> None:
            latest = next(self.numbers)
            self.engine.chat.handle(Cancel(max(0, latest - back)), self.now)

        @rule(sequences=st.integers(0, 6), cache=st.integers(0, 1 << 22))
        def tune(self, sequences: int, cache: int) -> None:
            self.engine.chat.handle(Tune(sequences=sequences, threads=1, prefix_cache_bytes=cache), self.now)

        @precondition(lambda self: self.engine.chat.busy)
        @rule(seconds=st.floats(0, 1))
        def step(self, seconds: float) -> None:
            self.now += seconds
            self.engine.chat.step(lambda: self.now)

        def teardown(self) -> None:
            if not hasattr(self, "engine"):
                return
            chat = self.engine.chat
            chat.handle(Tune(sequences=4, threads=1, prefix_cache_bytes=1 << 20), self.now)
            while chat.busy:
                chat.step(lambda: self.now)
            asked = next(self.numbers)
            ended = [reply.id for reply in self.engine.replies if isinstance(reply, Finished | Failed)]
            assert len(ended) == len(set(ended))
            assert not chat._generations
            assert chat._scheduler.reserved_tokens == 0
            import llama_cpp

            cells = [llama_cpp.llama_memory_seq_pos_max(chat._memory, sequence) for sequence in range(4)]
            assert cells == [-1] * 4
            chat.handle(Generate(id=asked, prompt=(Segment("pump " * 240),), max_tokens=2), self.now)
            while chat.busy:
                chat.step(lambda: self.now)
            assert isinstance(self.engine.replies[-1], Finished), "the whole context is free again"
            self.engine.close()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=8, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
