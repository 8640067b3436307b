"""Another embedder: documents are embedded anew while the old one answers, and switched in one transaction."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edged.errors import EmbedderMismatchError, ModelTooLargeError, RequestError
from edged.models.rollout import Stage
from edged.rag import reembed
from edged.rag.ingest import Library, embed_chunks
from edged.rag.retrieve import Retriever
from edged.runtime.health import ROLLOUT_FAILED, VECTORS_STALE
from edged.serving.embed import LocalEmbedder
from edged.serving.golden import DEFAULT_QUESTIONS
from edged.serving.rollout import Order
from edged.types import Ingested
from tests.rollout_rig import GB, Rig, Streams

TEXT = "The relief valve {number} opens at {number} bar. Its filter is changed every {number} weeks."


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path / "home")
    rig.home.mkdir()
    rig.install()
    rig.tell("y", "salt=other")
    return rig


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reembed, "REST", 0.0)


@pytest.fixture
async def running(rig: Rig) -> AsyncIterator[Rig]:
    async with rig.running():
        for number in range(20):
            await add(rig, number)
        yield rig


async def add(rig: Rig, number: int, collection: str = "default") -> Ingested:
    library = Library(rig.store, rig.embedders)
    text = TEXT.format(number=number)
    return await library.add(collection=collection, document_id=f"valve-{number}", title=None, format="text", text=text)


async def find(rig: Rig, number: int) -> tuple[str, str]:
    """The document found first for its own text, and whether by its vector."""
    found = await Retriever(rig.store, rig.embedders, near=0.9).retrieve(TEXT.format(number=number), "default", 1)
    by_vector = found.similarities[0][0] is not None
    return found.passages[0].passage.document_id, "vector" if by_vector else "keyword"


async def embedders_of_documents(rig: Rig) -> set[str]:
    found = set()
    for document in await rig.store.documents():
        for name in "xy":
            if await rig.store.is_current(document.collection, document.id, document.sha256, rig.identities[name]):
                found.add(name)
    return found


async def test_all_documents_are_embedded_anew_and_switched(running: Rig) -> None:
    past = await running.activate("y", "embed")
    assert (past.outcome, past.reason, running.serving("embed")) == (
        "promoted",
        "all documents were embedded anew",
        "y",
    )
    assert await embedders_of_documents(running) == {"y"}
    assert await find(running, 7) == ("valve-7", "vector")
    assert await running.store.check() == []
    assert await running.journal.lineup("embed") == {running.identities["y"]: Stage.ACTIVE}


async def test_questions_are_answered_by_vectors_all_the_way(running: Rig) -> None:
    async def ask() -> tuple[str, str]:
        document, how = await find(running, 3)
        return how, document

    async with Streams(ask).running() as streams:
        for model in "yxy":
            await streams.more(4)
            assert (await running.activate(model, "embed")).outcome == "promoted"
        await streams.more(4)
    assert (streams.failures, set(streams.answers)) == ([], {"vector"})


async def test_documents_that_come_meanwhile_are_in_the_switch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reembed, "CHUNKS_PER_BATCH", 1)
    async with rig.running():
        for number in range(20):
            await add(rig, number)
        rollout = await rig.rollouts.activate(Order(role="embed", model="y"))
        for number in range(20, 40):
            await add(rig, number)
        await rig.store.remove("default", "valve-0")
        assert (await rig.ended(rollout)).outcome == "promoted"
        assert await embedders_of_documents(rig) == {"y"}
        assert (await rig.store.counts())[0] == 39
        assert await find(rig, 39) == ("valve-39", "vector")
        assert await rig.store.check() == []


async def test_many_documents_added_during_many_switches_all_end_with_one_embedder(running: Rig) -> None:
    number = 100

    async def grow() -> tuple[str, str]:
        nonlocal number
        number += 1
        ingested = await add(running, number)
        return ingested.outcome, ""

    async with Streams(grow, count=2).running() as streams:
        for model in "yxy":
            await streams.more(2)
            assert (await running.activate(model, "embed")).outcome == "promoted"
    assert streams.failures == []
    assert await embedders_of_documents(running) == {"y"}
    assert await running.store.check() == []


async def test_an_embedder_that_fails_leaves_the_old_one_and_no_trace(rig: Rig) -> None:
    for words, reason in (
        ("alike", "it makes the same vector of different texts"),
        ("exit@start", "out of luck"),
        ("kill@request", "its worker died"),
    ):
        rig.tell("y", words)
        async with rig.running():
            await add(rig, 1)
            past = await rig.activate("y", "embed")
            assert past.outcome == "rolled_back"
            assert reason in past.reason
            assert rig.health.holds(ROLLOUT_FAILED)
            assert await embedders_of_documents(rig) == {"x"}
            assert await find(rig, 1) == ("valve-1", "vector")
            assert await rig.store.begin_staging(rig.identities["y"]) == (0, 1)


async def test_a_restart_in_the_middle_leaves_the_old_one_serving_and_goes_on_from_there(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.tell("y", "salt=other pause=0.05")
    monkeypatch.setattr(reembed, "CHUNKS_PER_BATCH", 1)
    async with rig.running():
        for number in range(8):
            await add(rig, number)
        rollout = await rig.rollouts.activate(Order(role="embed", model="y"))
        await rig.until(rollout, "embedding the documents anew")
        while (progress := rig.rollouts.progress(rollout)) is not None and progress.done < 3:
            await rig.rollouts.change(rollout, progress.version, 30)
    async with rig.running():
        assert rig.serving("embed") == "x"
        assert await embedders_of_documents(rig) == {"x"}
        assert await find(rig, 5) == ("valve-5", "vector")
        done, _ = await rig.store.begin_staging(rig.identities["y"])
        assert done >= 3
        assert (await rig.activate("y", "embed")).outcome == "promoted"


async def test_a_switch_that_was_not_noted_before_the_end_counts_at_the_next_start(rig: Rig) -> None:
    """Two databases, no transaction over both: the one with the vectors is right."""
    async with rig.running():
        await add(rig, 1)
        active = rig.services.active("embed")
        assert active is not None
        assert isinstance(active.client, LocalEmbedder)
        identity = rig.identities["y"]
        (chunk,) = await rig.store.unstaged(identity, 9, up_to=99)
        await rig.store.begin_staging(identity)
        (embedded,) = await embed_chunks(active.client, chunk.title, [chunk.chunk])
        await rig.store.stage(identity, [(chunk.id, embedded)])
        assert await rig.store.switch_embedder(identity, 384) == 0
    for _ in range(2):
        async with rig.running():
            assert rig.serving("embed") == "y"
            assert await embedders_of_documents(rig) == {"y"}
            assert await rig.store.switched_to() is None


async def test_vectors_of_another_embedder_are_made_anew_by_activating_the_one_in_use(rig: Rig) -> None:
    async with rig.running():
        await add(rig, 1)
    rig.configure(embed__model="y")
    async with rig.running():
        rig.health.set(VECTORS_STALE, "1 passage")
        assert (await find(rig, 1))[1] == "keyword"
        past = await rig.activate("y", "embed")
        assert (past.outcome, past.reason) == ("promoted", "all documents were embedded anew")
        assert not rig.health.conditions()
        assert await find(rig, 1) == ("valve-1", "vector")
        assert (await rig.activate("y", "embed")).outcome == "unchanged"


async def test_an_embedder_needs_room_beside_the_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.memory_bytes = 20_000_000
    monkeypatch.setattr("edged.serving.rollout._resident_bytes", lambda _service: GB)
    async with rig.running():
        with pytest.raises(ModelTooLargeError, match="both embedders are needed"):
            await rig.rollouts.activate(Order(role="embed", model="y"))


async def test_canaries_and_golden_questions_are_for_chat_models(running: Rig) -> None:
    for options in ({"share": 0.1}, {"golden": DEFAULT_QUESTIONS}):
        with pytest.raises(RequestError, match="no canary share and no golden questions"):
            await running.activate("y", "embed", **options)


async def test_a_vector_of_the_former_embedder_meets_no_vector_of_the_new_one(running: Rig) -> None:
    async with running.embedders.lease() as old:
        vector = await old.embed_question("relief valve")
    await running.activate("y", "embed")
    with pytest.raises(EmbedderMismatchError):
        await running.store.nearest("default", vector, 3, embedder=old.identity)


async def test_progress_is_counted_in_passages(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reembed, "CHUNKS_PER_BATCH", 1)
    rig.tell("y", "pause=0.02")
    async with rig.running():
        for number in range(5):
            await add(rig, number)
        rollout = await rig.rollouts.activate(Order(role="embed", model="y"))
        seen = set()
        while (progress := rig.rollouts.progress(rollout)) is not None:
            if "embedding" in progress.step:
                seen.add((progress.done, progress.total))
            await rig.rollouts.change(rollout, progress.version, 30)
            await asyncio.sleep(0)
        assert {total for _, total in seen} == {5}
        assert {done for done, _ in seen} >= {1, 2, 3}
