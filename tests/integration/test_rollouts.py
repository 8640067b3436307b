"""Models come into service and leave it under load; candidates misbehave, memory is short, the daemon dies."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edged.errors import (
    DeadlineError,
    GgufError,
    ModelError,
    ModelNotFoundError,
    ModelTooLargeError,
    RequestError,
    RolloutBusyError,
    WorkerUnavailableError,
)
from edged.models.rollout import Stage
from edged.runtime.health import CHAT_DOWN, CHAT_MODEL_MISSING, ROLLOUT_FAILED
from edged.serving.golden import GoldenQuestion
from edged.serving.rollout import Order
from edged.workers.worker import Worker
from tests.rollout_rig import GB, TALK, Rig, Streams

SLOW = "pause=0.02"


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path / "home")
    rig.home.mkdir()
    rig.install()
    for model in "abc":
        rig.tell(model, "pause=0.005")
    return rig


@pytest.fixture
async def running(rig: Rig) -> AsyncIterator[Rig]:
    async with rig.running():
        yield rig


async def moves_of(rig: Rig, model: str) -> list[str]:
    return [move.new for move in reversed(await rig.journal.moves(100)) if move.model.startswith(f"{model}@")]


# --- the usual way ---------------------------------------------------------------------------------


async def test_a_candidate_that_is_as_good_takes_over_and_every_move_is_stored(running: Rig) -> None:
    past = await running.activate("b")
    assert (past.outcome, running.serving()) == ("promoted", "b")
    assert await running.ask() == ("b", "All is well.")
    assert await moves_of(running, "b") == ["staged", "warm", "active"]
    assert await moves_of(running, "a") == ["staged", "warm", "active", "draining", "retired"]
    assert past.evidence["golden"]["candidate"]["passed"] == 4
    assert not running.health.conditions()


async def test_activating_what_is_active_changes_nothing(running: Rig) -> None:
    past = await running.activate("a")
    assert (past.outcome, past.reason) == ("unchanged", "it is active already")
    assert await moves_of(running, "a") == ["staged", "warm", "active"]


async def test_requests_under_way_are_finished_by_the_model_they_began_with(rig: Rig) -> None:
    rig.tell("a", SLOW)
    async with rig.running():
        under_way = asyncio.create_task(rig.ask("tokens=60"))
        rollout = await rig.rollouts.activate(Order(role="chat", model="b", golden=(TALK,)))
        await rig.until(rollout, "finishing the requests")
        former = await rig.journal.lineup("chat")
        assert sorted(stage.value for stage in former.values()) == ["active", "draining"]
        assert (await rig.ask())[0] == "b"
        assert not under_way.done()
        assert (await under_way)[0] == "a"
        assert (await rig.ended(rollout)).outcome == "promoted"


async def test_ten_swaps_under_four_streams_fail_no_request(running: Rig) -> None:
    async with Streams(running.ask).running() as streams:
        for model in "bcabcabcab":
            await streams.more(8)
            assert (await running.activate(model, golden=(TALK,))).outcome == "promoted"
        await streams.more(8)
    assert streams.failures == []
    assert set(streams.answers) == {"a", "b", "c"}


async def test_rolling_back_brings_the_model_before_and_again_the_other(running: Rig) -> None:
    await running.activate("b")
    assert (await running.ended(await running.rollouts.roll_back("chat"))).outcome == "promoted"
    assert running.serving() == "a"
    await running.ended(await running.rollouts.roll_back("chat"))
    assert running.serving() == "b"


async def test_there_is_nothing_to_go_back_to_before_the_first_activation(running: Rig) -> None:
    with pytest.raises(RequestError, match="no chat model to go back to"):
        await running.rollouts.roll_back("chat")


async def test_a_second_rollout_is_refused_while_one_goes_on(running: Rig) -> None:
    first = await running.rollouts.activate(Order(role="chat", model="b"))
    with pytest.raises(RolloutBusyError, match="the rollout of 'b'"):
        await running.rollouts.activate(Order(role="chat", model="c"))
    await running.ended(first)


# --- candidates that must not serve ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("exit@start", "out of luck"),
        ("kill@start", "signal 9"),
        ("kill@request", "its worker died"),
        ("garbage@request", "its worker died"),
        ("babble", "golden questions, 4 are needed"),
        ("pause=0.2", "tokens/s where the active model makes"),
    ],
)
async def test_a_candidate_that_misbehaves_is_taken_back_with_the_reason(rig: Rig, words: str, reason: str) -> None:
    rig.tell("b", words)
    async with rig.running(), Streams(rig.ask).running() as streams:
        await streams.more(4)
        past = await rig.activate("b")
        await streams.more(4)
        assert (past.outcome, rig.serving()) == ("rolled_back", "a")
        assert reason in past.reason
        (condition,) = rig.health.conditions()
        assert (condition.code, condition.text) == (ROLLOUT_FAILED.code, f"b: {past.reason}")
        assert (await moves_of(rig, "b"))[-1] == "retired"
        assert (await moves_of(rig, "a"))[-1] == "active"
    assert (streams.failures, set(streams.answers)) == ([], {"a"})


async def test_an_answer_that_lacks_what_is_demanded_keeps_the_candidate_out(rig: Rig) -> None:
    async with rig.running():
        asks = GoldenQuestion(ask="Say:\n- one fact", contains=("fact",)), GoldenQuestion(ask="x", contains=("well",))
        assert (await rig.activate("b", golden=asks)).outcome == "promoted"
        rig.tell("c", "babble")
        past = await rig.activate("c", golden=asks)
        assert past.reason.startswith("it passed 0 of 2 golden questions, 2 are needed; 'Say:")


async def test_the_next_success_ends_the_condition(rig: Rig) -> None:
    rig.tell("b", "exit@start")
    async with rig.running():
        await rig.activate("b")
        assert rig.health.holds(ROLLOUT_FAILED)
        await rig.activate("c")
        assert not rig.health.conditions()


async def test_an_unknown_a_missing_a_broken_and_a_foreign_model_are_refused_at_once(running: Rig) -> None:
    models = running.home / "models"
    (models / "b.gguf").write_bytes(b"GGUF and nothing else")
    (models / "c.gguf").unlink()
    for name, kind in (("nobody", ModelNotFoundError), ("c", ModelError), ("b", GgufError), ("x", ModelError)):
        with pytest.raises(kind):
            await running.rollouts.activate(Order(role="chat", model=name))
    assert {past.outcome for past in await running.rollouts.history(9)} == {"refused"}
    assert await running.ask() == ("a", "All is well.")
    assert await moves_of(running, "b") == []


async def test_a_file_whose_content_changed_is_found_before_it_serves(running: Rig) -> None:
    file = running.home / "models" / "b.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    stat = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    past = await running.activate("b")
    assert past.outcome == "rolled_back"
    assert "checksum" in past.reason or "content" in past.reason
    assert await moves_of(running, "b") == ["staged", "retired"]


async def test_a_model_beyond_all_memory_is_refused_with_the_figures(running: Rig) -> None:
    running.memory_bytes = 1_000_000
    with pytest.raises(ModelTooLargeError, match="MB of memory, 1 MB are free") as raised:
        await running.rollouts.activate(Order(role="chat", model="b"))
    assert raised.value.facts["available_bytes"] == 1_000_000
    assert await running.ask() == ("a", "All is well.")


async def test_a_rollout_under_way_can_be_ended_by_hand(rig: Rig) -> None:
    rig.tell("b", "pause=0.3")
    async with rig.running():
        rollout = await rig.rollouts.activate(Order(role="chat", model="b"))
        await rig.until(rollout, "golden questions to the candidate")
        assert await rig.rollouts.roll_back("chat") == rollout
        past = await rig.ended(rollout)
        assert (past.outcome, past.reason) == ("rolled_back", "it was rolled back on request")
        assert rig.serving() == "a"
        assert not rig.health.conditions()
        assert (await rig.activate("c")).outcome == "promoted"


# --- canaries --------------------------------------------------------------------------------------


async def test_a_good_canary_gets_its_share_and_takes_over(running: Rig) -> None:
    async with Streams(running.ask).running() as streams:
        past = await running.activate("b", share=0.3)
    assert (past.outcome, running.serving()) == ("promoted", "b")
    assert "canary requests were as good" in past.reason
    assert past.evidence["canary"]["candidate"]["requests"] >= 8
    assert past.evidence["canary"]["active"]["requests"] > 0
    assert streams.failures == []
    assert await moves_of(running, "b") == ["staged", "warm", "canary", "active"]


async def test_a_canary_that_crashes_is_taken_back_and_nobody_notices(rig: Rig) -> None:
    obstacle = rig.home / "obstacle"
    rig.tell("b", f"pause=0.005 kill@stream while={obstacle}")
    async with rig.running(), Streams(rig.ask).running() as streams:
        rollout = await rig.rollouts.activate(Order(role="chat", model="b", share=0.5))
        await rig.until(rollout, "canary")
        obstacle.touch()
        past = await rig.ended(rollout)
        await streams.more(8)
    assert (past.outcome, rig.serving()) == ("rolled_back", "a")
    assert "died" in past.reason or "of its requests failed" in past.reason
    assert streams.failures == []


async def test_a_canary_whose_answers_are_no_speech_is_taken_back(rig: Rig) -> None:
    async with rig.running():

        async def babble() -> tuple[str, str]:
            async with rig.chats.lease() as chat:
                said = "la " * 40 if chat.name.startswith("b@") else "all is well"
                prompt = chat.render([("user", f"Say:\n- {said}")])
                async for _ in chat.generate(prompt, max_tokens=99):
                    pass
                return chat.name, ""

        async with Streams(babble).running():
            past = await rig.activate("b", share=0.5)
        assert past.outcome == "rolled_back"
        assert past.reason.startswith("as a canary, only 0% of its answers had the form asked for")
        assert rig.serving() == "a"


async def test_a_canary_whose_text_stands_on_nothing_is_taken_back(rig: Rig) -> None:
    async with rig.running():

        async def ask() -> tuple[str, str]:
            async with rig.chats.lease() as chat:
                async for _ in chat.generate(chat.render([("user", "?")]), max_tokens=9):
                    pass
                chat.report(overlap=0.1 if chat.name.startswith("b@") else 0.9)
                return chat.name, ""

        async with Streams(ask).running():
            past = await rig.activate("b", share=0.5)
        assert (past.outcome, rig.serving()) == ("rolled_back", "a")
        assert "only 10% of its text stood on the sentences" in past.reason


async def test_without_requests_the_time_limit_promotes_what_passed_its_questions(rig: Rig) -> None:
    rig.configure()
    rig.trial = type(rig.trial)(canary_requests=8, canary_seconds=0.2, limits=rig.trial.limits)
    async with rig.running():
        past = await rig.activate("b", share=0.1)
    assert (past.outcome, past.reason) == ("promoted", "nothing was wrong with 0 canary requests in 0.2 s")


# --- memory for one model only ---------------------------------------------------------------------


def only_one_fits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidate's need is more than what is free, and less than that and what the active model holds."""
    rig.memory_bytes = 20_000_000
    monkeypatch.setattr("edged.serving.rollout._resident_bytes", lambda _service: GB)


async def test_where_memory_holds_one_model_requests_wait_and_none_fails(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one_fits(rig, monkeypatch)
    async with rig.running(), Streams(rig.ask).running() as streams:
        for model in "bcab":
            await streams.more(4)
            past = await rig.activate(model, golden=(TALK,))
            assert (past.outcome, rig.serving()) == ("promoted", model)
        await streams.more(4)
        once = ["staged", "warm", "active", "draining", "retired"]
        assert await moves_of(rig, "a") == [*once, *once]
    assert streams.failures == []


async def test_two_models_are_never_loaded_where_memory_holds_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    only_one_fits(rig, monkeypatch)
    alive: set[int] = set()
    most = 0
    start, stop = Worker.start, Worker.stop

    def started(worker: Worker) -> None:
        nonlocal most
        if worker.settings.kind == "chat":
            alive.add(id(worker))
            most = max(most, len(alive))
        start(worker)

    async def stopped(worker: Worker) -> None:
        await stop(worker)
        alive.discard(id(worker))

    monkeypatch.setattr(Worker, "start", started)
    monkeypatch.setattr(Worker, "stop", stopped)
    async with rig.running():
        await rig.activate("b")
    assert most == 1


async def test_a_bad_candidate_in_scarce_memory_brings_the_former_model_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one_fits(rig, monkeypatch)
    rig.tell("b", "exit@start")
    async with rig.running(), Streams(rig.ask).running() as streams:
        past = await rig.activate("b", golden=(TALK,))
        await streams.more(8)
        assert (past.outcome, rig.serving()) == ("rolled_back", "a")
        assert "out of luck" in past.reason
        assert not rig.health.holds(CHAT_DOWN)
        assert await moves_of(rig, "b") == ["staged", "retired"]
    assert (streams.failures, set(streams.answers)) == ([], {"a"})


async def test_a_held_request_is_told_how_long_and_refused_where_its_deadline_is_nearer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one_fits(rig, monkeypatch)
    async with rig.running():
        rig.tell("a", SLOW)
        under_way = asyncio.create_task(rig.ask("pause=0.02 tokens=100"))
        rollout = await rig.rollouts.activate(Order(role="chat", model="b", golden=(TALK,)))
        await rig.until(rollout, "further ones wait")
        assert rig.chats.held_seconds > 0
        with pytest.raises(WorkerUnavailableError, match="is being exchanged, for about") as refused:
            await rig.ask(deadline=0.01)
        assert refused.value.facts["retry_after_seconds"] == pytest.approx(rig.chats.held_seconds, abs=1)
        with pytest.raises(DeadlineError):
            rig.chats.hold(0.0)
            await rig.ask(deadline=0.6)
        waiting = asyncio.create_task(rig.ask(deadline=60))
        assert (await under_way)[0] == "a"
        assert (await rig.ended(rollout)).outcome == "promoted"
        assert (await waiting)[0] == "b"


async def test_ending_a_serial_rollout_by_hand_serves_the_former_model(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_one_fits(rig, monkeypatch)
    rig.tell("b", "pause=0.3")
    async with rig.running():
        rollout = await rig.rollouts.activate(Order(role="chat", model="b"))
        await rig.until(rollout, "golden questions to the candidate")
        await rig.rollouts.roll_back("chat")
        assert (await rig.ended(rollout)).outcome == "rolled_back"
        assert await rig.ask() == ("a", "All is well.")


# --- restarts --------------------------------------------------------------------------------------


async def test_what_was_activated_is_served_after_a_restart(rig: Rig) -> None:
    async with rig.running():
        await rig.activate("b")
    async with rig.running():
        assert await rig.ask() == ("b", "All is well.")
        assert await rig.journal.lineup("chat") == {rig.identities["b"]: Stage.ACTIVE}


async def test_a_model_named_in_the_configuration_later_is_the_one_served(rig: Rig) -> None:
    async with rig.running():
        await rig.activate("b")
    rig.configure(chat__model="c")
    async with rig.running():
        assert rig.serving() == "c"
        assert await rig.journal.lineup("chat") == {rig.identities["c"]: Stage.ACTIVE}


async def test_a_daemon_that_ends_in_the_middle_comes_back_with_the_active_model(rig: Rig) -> None:
    rig.tell("b", "pause=0.3")
    async with rig.running():
        await rig.activate("c")
        rollout = await rig.rollouts.activate(Order(role="chat", model="b"))
        await rig.until(rollout, "golden questions to the candidate")
    async with rig.running():
        assert rig.serving() == "c"
        past = await rig.rollouts.past(rollout)
        assert (past.outcome, past.reason) == ("interrupted", "the daemon ended in the middle")
        assert await rig.journal.lineup("chat") == {rig.identities["c"]: Stage.ACTIVE}
        assert (await moves_of(rig, "b"))[-1] == "retired"


async def test_where_the_activated_file_is_gone_the_configured_model_serves_and_health_says_so(rig: Rig) -> None:
    async with rig.running():
        await rig.activate("b")
    (rig.home / "models" / "b.gguf").unlink()
    async with rig.running():
        assert rig.serving() == "a"
        assert rig.health.holds(CHAT_MODEL_MISSING)


async def test_without_a_model_the_first_activation_brings_one(rig: Rig) -> None:
    rig.configure(chat__model="nobody")
    async with rig.running():
        assert rig.health.holds(CHAT_MODEL_MISSING)
        with pytest.raises(WorkerUnavailableError):
            await rig.ask()
        assert (await rig.activate("b")).outcome == "promoted"
        assert await rig.ask() == ("b", "All is well.")
        assert not rig.health.conditions()


async def test_of_the_model_in_service_the_conditions_tell_whichever_it_is(running: Rig) -> None:
    await running.activate("b")
    service = running.services.active("chat")
    assert service is not None
    assert service.worker.pid is not None
    heard = asyncio.Event()
    running.health.subscribe(heard.set)
    os.kill(service.worker.pid, signal.SIGKILL)
    await heard.wait()
    assert running.health.holds(CHAT_DOWN)
    assert await running.ask() == ("b", "All is well.")
    assert not running.health.holds(CHAT_DOWN)
