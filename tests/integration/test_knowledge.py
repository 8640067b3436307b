"""The knowledge store on real files: what is put is found, replaced whole, and survives a kill."""

import asyncio
import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged.errors import DocumentNotFoundError, EmbedderMismatchError, StoreClosedError, StoreError
from edged.store.knowledge import EmbeddedChunk, KnowledgeStore
from edged.store.vectors import FloatArray
from edged.types import Chunk, Ingested, Sentence

DIMENSIONS = 16
EMBEDDER = "model-a@1"


def vector_of(text: str) -> FloatArray:
    """A unit vector that depends on the text alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    vector = np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)
    normalised: FloatArray = vector / np.float32(np.linalg.norm(vector))
    return normalised


def embedded(ordinal: int, *sentences: str, headings: Sequence[str] = ()) -> EmbeddedChunk:
    placed, start = [], 0
    for sentence in sentences:
        placed.append(Sentence(sentence, start, start + len(sentence)))
        start += len(sentence) + 1
    chunk = Chunk(ordinal, tuple(headings), tuple(placed))
    return EmbeddedChunk(chunk, vector_of(chunk.text), np.stack([vector_of(sentence) for sentence in sentences]))


async def put(
    store: KnowledgeStore,
    document_id: str,
    *paragraphs: str,
    collection: str = "manuals",
    title: str = "Pump",
    headings: Sequence[str] = (),
    embedder: str = EMBEDDER,
) -> Ingested:
    """Store a document whose chunks are its paragraphs, one sentence each."""
    text = "\n".join(paragraphs)
    return await store.put(
        collection=collection,
        document_id=document_id,
        title=title,
        format="text",
        text=text,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        embedder=embedder,
        chunks=[embedded(ordinal, paragraph, headings=headings) for ordinal, paragraph in enumerate(paragraphs)],
    )


async def texts(store: KnowledgeStore, chunk_ids: Sequence[int]) -> list[str]:
    return [passage.passage.sentences[0].text for passage in await store.passages(chunk_ids)]


async def found_by_vector(store: KnowledgeStore, text: str, limit: int = 1, collection: str = "manuals") -> list[str]:
    return await texts(store, [found for found, _ in await store.nearest(collection, vector_of(text), limit)])


async def found_by_keyword(store: KnowledgeStore, question: str, collection: str = "manuals") -> list[str]:
    return await texts(store, [found for found, _ in await store.keyword(collection, question, 10)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "knowledge.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[KnowledgeStore]:
    store = await KnowledgeStore.open(path)
    await store.use_embedder(EMBEDDER, DIMENSIONS)
    yield store
    await store.close()


async def test_a_document_is_found_by_vector_and_by_keyword(store: KnowledgeStore) -> None:
    await put(store, "cp-250", "E-217 means low oil pressure.", "Grease the bearing monthly.")
    assert await found_by_vector(store, "Grease the bearing monthly.") == ["Grease the bearing monthly."]
    assert await found_by_keyword(store, "what is E-217?") == ["E-217 means low oil pressure."]
    [(_, cosine)] = await store.nearest("manuals", vector_of("Grease the bearing monthly."), 1)
    assert cosine == pytest.approx(1.0, abs=1e-6)
    assert await store.check() == []


async def test_putting_tells_what_is_stored_and_whether_it_replaced_something(store: KnowledgeStore) -> None:
    first = await put(store, "cp-250", "Überdruck", "zwei")
    assert first.outcome == "added"
    assert first.document == await store.find("manuals", "cp-250")
    assert (first.document.chunks, first.document.bytes) == (2, len("Überdruck\nzwei".encode()))
    assert (await put(store, "cp-250", "eins")).outcome == "replaced"
    assert await store.text("manuals", "cp-250") == "eins"


async def test_replacing_leaves_nothing_of_the_old_version(store: KnowledgeStore) -> None:
    await put(store, "cp-250", "The old oil.", "The old grease.")
    old = [chunk_id for chunk_id, _ in await store.nearest("manuals", vector_of("x"), 10)]
    await put(store, "cp-250", "The new oil.")
    assert await found_by_vector(store, "The old oil.", 10) == ["The new oil."]
    assert await found_by_keyword(store, "old grease") == []
    assert await store.passages(old) == []
    assert await store.counts() == (1, 1)
    assert await store.check() == []


async def test_ids_of_chunks_are_never_given_twice(store: KnowledgeStore) -> None:
    seen: set[int] = set()
    for _ in range(3):
        await put(store, "cp-250", "one", "two")
        ids = {chunk_id for chunk_id, _ in await store.nearest("manuals", vector_of("x"), 10)}
        assert not ids & seen
        seen |= ids
        await store.remove("manuals", "cp-250")


async def test_a_removed_document_is_gone_everywhere(store: KnowledgeStore) -> None:
    await put(store, "cp-250", "Low oil pressure.")
    await put(store, "mg-320", "High oil pressure.")
    await store.remove("manuals", "cp-250")
    assert await store.find("manuals", "cp-250") is None
    assert await found_by_vector(store, "Low oil pressure.", 10) == ["High oil pressure."]
    assert await found_by_keyword(store, "oil pressure") == ["High oil pressure."]
    assert await store.check() == []


async def test_a_missing_document_is_an_error_where_it_is_needed(store: KnowledgeStore) -> None:
    with pytest.raises(DocumentNotFoundError) as caught:
        await store.remove("manuals", "nothing")
    assert caught.value.facts == {"collection": "manuals", "document": "nothing"}
    with pytest.raises(DocumentNotFoundError):
        await store.text("manuals", "nothing")
    assert await store.find("manuals", "nothing") is None


async def test_collections_do_not_see_each_other(store: KnowledgeStore) -> None:
    await put(store, "same-id", "Oil of the ship.", collection="ship")
    await put(store, "same-id", "Oil of the plant.", collection="plant")
    assert await found_by_vector(store, "Oil", 10, "ship") == ["Oil of the ship."]
    assert await found_by_keyword(store, "oil", "plant") == ["Oil of the plant."]
    assert await store.collections() == ["plant", "ship"]
    assert [document.collection for document in await store.documents()] == ["plant", "ship"]
    assert [document.collection for document in await store.documents("ship")] == ["ship"]


async def test_an_unknown_collection_holds_nothing(store: KnowledgeStore) -> None:
    assert await store.nearest("nowhere", vector_of("x"), 5) == []
    assert await store.keyword("nowhere", "oil", 5) == []
    assert await store.documents("nowhere") == []


async def test_words_of_title_and_headings_find_a_passage(store: KnowledgeStore) -> None:
    await put(store, "gb-45", "Every 4000 hours.", title="GB-45 gearbox", headings=("Care", "Oil change"))
    assert await found_by_keyword(store, "oil change of the gearbox") == ["Every 4000 hours."]


async def test_keyword_scores_are_higher_for_better_matches(store: KnowledgeStore) -> None:
    await put(store, "a", "Oil pressure alarm.", "Oil is drained.", "Nothing of the kind.")
    scores = await store.keyword("manuals", "oil pressure", 10)
    assert await texts(store, [chunk_id for chunk_id, _ in scores]) == ["Oil pressure alarm.", "Oil is drained."]
    assert scores[0][1] > scores[1][1] > 0


async def test_chinese_text_is_found_by_keyword(store: KnowledgeStore) -> None:
    await put(store, "泵", "轴承温度报警设定在85°C。", title="泵手册")
    assert await found_by_keyword(store, "轴承温度是多少") == ["轴承温度报警设定在85°C。"]


async def test_passages_come_whole_and_in_the_order_asked(store: KnowledgeStore) -> None:
    await put(store, "cp-250", "one", "two", "three", headings=("Care", "Öl"))
    ids = {text: (await store.nearest("manuals", vector_of(text), 1))[0][0] for text in ("one", "two", "three")}
    asked = [ids["three"], 999_999, ids["one"]]
    assert await texts(store, asked) == ["three", "one"]
    passage, sentence_vectors = (found := (await store.passages([ids["two"]]))[0]).passage, found.sentence_vectors
    assert (passage.chunk_id, passage.document_id, passage.title) == (ids["two"], "cp-250", "Pump")
    assert passage.headings == ("Care", "Öl")
    assert passage.sentences == (Sentence("two", 0, 3),)
    assert sentence_vectors is not None
    np.testing.assert_allclose(sentence_vectors, [vector_of("two")], atol=1e-3)  # kept as float16


async def test_a_document_is_current_with_the_same_content_and_embedder_only(store: KnowledgeStore) -> None:
    stored = (await put(store, "cp-250", "text")).document
    assert await store.is_current("manuals", "cp-250", stored.sha256, EMBEDDER)
    assert not await store.is_current("manuals", "cp-250", "other", EMBEDDER)
    assert not await store.is_current("manuals", "cp-250", stored.sha256, "model-b@1")
    assert not await store.is_current("manuals", "other", stored.sha256, EMBEDDER)


async def test_reopening_gives_the_same_results(path: Path) -> None:
    async def snapshot(store: KnowledgeStore) -> object:
        await store.use_embedder(EMBEDDER, DIMENSIONS)
        near = [(found, round(score, 5)) for found, score in await store.nearest("manuals", vector_of("q"), 20)]
        return near, await store.keyword("manuals", "paragraph 7", 20), await store.documents(), await store.counts()

    first = await KnowledgeStore.open(path)
    await first.use_embedder(EMBEDDER, DIMENSIONS)
    for number in range(10):
        await put(first, f"doc-{number}", *(f"paragraph {number} {part}" for part in range(5)))
    await put(first, "doc-3", "paragraph replaced 7")
    await first.remove("manuals", "doc-4")
    before = await snapshot(first)
    await first.close()
    second = await KnowledgeStore.open(path)
    assert await snapshot(second) == before
    assert await second.check() == []
    await second.close()


async def test_vectors_of_another_embedder_are_left_out_and_counted(store: KnowledgeStore) -> None:
    await put(store, "old", "one", "two")
    assert await store.use_embedder("model-b@1", DIMENSIONS) == 2
    assert await store.nearest("manuals", vector_of("one"), 5) == []
    await put(store, "new", "three", embedder="model-b@1")
    assert await found_by_vector(store, "one", 5) == ["three"]
    assert await found_by_keyword(store, "one") == ["one"]
    [(old_id, _)] = await store.keyword("manuals", "one", 1)
    assert (await store.passages([old_id]))[0].sentence_vectors is None
    assert await store.check() == []
    assert await store.use_embedder(EMBEDDER, DIMENSIONS) == 1
    assert sorted(await found_by_vector(store, "one", 5)) == ["one", "two"]


async def test_replacing_a_document_of_another_embedder_brings_it_back(store: KnowledgeStore) -> None:
    await put(store, "doc", "one", "two")
    await store.use_embedder("model-b@1", DIMENSIONS)
    await put(store, "doc", "one", embedder="model-b@1")
    assert await found_by_vector(store, "one", 5) == ["one"]
    assert await store.use_embedder("model-b@1", DIMENSIONS) == 0
    assert await store.check() == []


async def test_a_document_of_another_embedder_is_refused(store: KnowledgeStore) -> None:
    with pytest.raises(EmbedderMismatchError) as caught:
        await put(store, "cp-250", "text", embedder="model-b@1")
    assert caught.value.facts["in_use"] == EMBEDDER
    assert await store.counts() == (0, 0)


async def test_nothing_is_taken_or_near_before_an_embedder_is_in_use(path: Path) -> None:
    store = await KnowledgeStore.open(path)
    with pytest.raises(EmbedderMismatchError):
        await put(store, "cp-250", "text")
    assert await store.nearest("manuals", vector_of("text"), 5) == []
    await store.close()


async def test_vectors_of_other_dimensions_or_without_a_value_are_refused(store: KnowledgeStore) -> None:
    whole = embedded(0, "text")
    for chunk, error in (
        (EmbeddedChunk(whole.chunk, whole.vector[:-1], whole.sentence_vectors), EmbedderMismatchError),
        (EmbeddedChunk(whole.chunk, whole.vector, whole.sentence_vectors[:0]), EmbedderMismatchError),
        (EmbeddedChunk(whole.chunk, whole.vector * np.float32("nan"), whole.sentence_vectors), StoreError),
    ):
        with pytest.raises(error):
            await store.put(
                collection="manuals",
                document_id="x",
                title="",
                format="text",
                text="text",
                sha256="",
                embedder=EMBEDDER,
                chunks=[chunk],
            )
    with pytest.raises(EmbedderMismatchError):
        await store.nearest("manuals", whole.vector[:-1], 5)
    assert await store.counts() == (0, 0)


async def test_concurrent_changes_of_the_same_documents_leave_index_and_rows_equal(store: KnowledgeStore) -> None:
    """Puts, removals and embedder switches race; whatever wins, memory and file say the same."""

    async def change(number: int) -> None:
        document_id = f"doc-{number % 3}"
        if number % 11 == 0:
            await store.use_embedder("model-b@1" if number % 2 else EMBEDDER, DIMENSIONS)
        elif number % 5 == 0:
            await store.remove("manuals", document_id)
        else:
            embedder = "model-b@1" if number % 7 == 0 else EMBEDDER
            await put(store, document_id, *(f"{number} {part}" for part in range(number % 4)), embedder=embedder)

    outcomes = await asyncio.gather(*(change(number) for number in range(200)), return_exceptions=True)
    unexpected = [
        outcome
        for outcome in outcomes
        if isinstance(outcome, BaseException) and not isinstance(outcome, DocumentNotFoundError | EmbedderMismatchError)
    ]
    assert unexpected == []
    assert await store.check() == []
    in_memory = {chunk_id for chunk_id, _ in await store.nearest("manuals", vector_of("x"), 1000)}
    await store.use_embedder(EMBEDDER, DIMENSIONS)
    assert await store.check() == []
    rebuilt = {chunk_id for chunk_id, _ in await store.nearest("manuals", vector_of("x"), 1000)}
    assert in_memory == rebuilt  # the last switch of the race was to this embedder
    usable = [
        info for info in await store.documents() if await store.is_current("manuals", info.id, info.sha256, EMBEDDER)
    ]
    assert sum(document.chunks for document in usable) == len(rebuilt)


async def test_a_put_whose_caller_gave_up_still_leaves_index_and_rows_equal(store: KnowledgeStore) -> None:
    for number in range(30):
        task = asyncio.create_task(put(store, "doc", f"version {number}"))
        for _ in range(number % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await store.check() == []


async def test_a_document_that_cannot_be_stored_fails_alone(store: KnowledgeStore) -> None:
    outcomes = await asyncio.gather(
        put(store, "good", "fine"),
        put(store, "bad", "lone \ud800"),
        put(store, "other", "fine"),
        return_exceptions=True,
    )
    assert [isinstance(outcome, Ingested) for outcome in outcomes] == [True, False, True]
    assert [document.id for document in await store.documents()] == ["good", "other"]
    assert await store.check() == []


@given(document_id=st.text(), collection=st.text())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_and_names_may_be_any_text(tmp_path: Path, document_id: str, collection: str) -> None:
    async def round_trip() -> None:
        store = await KnowledgeStore.open(tmp_path / "any.db")
        await store.use_embedder(EMBEDDER, DIMENSIONS)
        await put(store, document_id, "text", collection=collection)
        found = await store.find(collection, document_id)
        assert found is not None
        assert (found.id, found.collection) == (document_id, collection)
        assert await found_by_keyword(store, "text", collection) == ["text"]
        await store.remove(collection, document_id)
        await store.close()

    asyncio.run(round_trip())


async def test_a_keyword_entry_that_is_missing_is_found_by_the_check(path: Path) -> None:
    store = await KnowledgeStore.open(path)
    await store.use_embedder(EMBEDDER, DIMENSIONS)
    await put(store, "doc", "one", "two")
    await store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM chunks_fts WHERE rowid = 1")
        connection.execute("DELETE FROM vectors WHERE chunk_id = 2")
    reopened = await KnowledgeStore.open(path)
    assert await reopened.check() == ["1 chunks are missing in the keyword index"]
    assert await reopened.use_embedder(EMBEDDER, DIMENSIONS) == 1
    await reopened.close()


async def test_a_closed_store_refuses_work(path: Path) -> None:
    store = await KnowledgeStore.open(path)
    await store.use_embedder(EMBEDDER, DIMENSIONS)
    await store.close()
    await store.close()
    with pytest.raises(StoreClosedError):
        await store.nearest("manuals", vector_of("x"), 1)
    with pytest.raises(StoreClosedError):
        await store.counts()


async def test_thirty_rounds_of_open_and_close_leave_no_descriptor_and_no_thread(path: Path) -> None:
    async def one_round() -> None:
        store = await KnowledgeStore.open(path)
        await store.use_embedder(EMBEDDER, DIMENSIONS)
        await put(store, "doc", "text")
        await asyncio.gather(*(store.nearest("manuals", vector_of("x"), 1) for _ in range(4)))
        await store.close()

    def held() -> tuple[int, int]:
        # The loop's own pool grows as it likes; the store's threads carry the file's name.
        ours = sum(thread.name.startswith(path.stem) for thread in threading.enumerate())
        return len(os.listdir("/proc/self/fd")), ours  # noqa: PTH208 - descriptors are no files

    await one_round()  # starts the loop's own executor
    before = held()
    for _ in range(30):
        await one_round()
    assert held() == before


VERSIONS_UNTIL_KILLED = """
import asyncio, sys
from pathlib import Path
from edged.store.knowledge import KnowledgeStore
from tests.integration.test_knowledge import DIMENSIONS, EMBEDDER, put

async def main():
    store = await KnowledgeStore.open(Path(sys.argv[1]))
    await store.use_embedder(EMBEDDER, DIMENSIONS)
    version = 0
    while True:
        version += 1
        await asyncio.gather(*(
            put(store, f"doc-{number}", *(f"version {version} part {part}" for part in range(40)))
            for number in range(3)
        ))
        print(version, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("acknowledged", [1, 2, 5])
async def test_a_kill_amid_puts_leaves_every_document_wholly_old_or_wholly_new(path: Path, acknowledged: int) -> None:
    last = await asyncio.to_thread(_kill_after, path, acknowledged)
    store = await KnowledgeStore.open(path)
    others = await store.use_embedder(EMBEDDER, DIMENSIONS)
    assert others == 0
    assert await store.check() == []
    assert await store.counts() == (3, 120)
    for number in range(3):
        document = await store.text("manuals", f"doc-{number}")
        versions = set(re.findall(r"version (\d+)", document))
        assert len(versions) == 1
        assert int(versions.pop()) >= last  # what was acknowledged is there
        assert await _stored_parts(store, f"doc-{number}") == sorted(document.splitlines())
    await store.close()


def _kill_after(path: Path, acknowledged: int) -> int:
    """Run the child until it has told of ``acknowledged`` rounds, kill it; the last round it told of."""
    command = [sys.executable, "-c", VERSIONS_UNTIL_KILLED, str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(acknowledged)]
        child.kill()
        told += child.stdout.readlines()
    return int(told[-1])


async def _stored_parts(store: KnowledgeStore, document_id: str) -> list[str]:
    ids = [chunk_id for chunk_id, _ in await store.nearest("manuals", vector_of("x"), 1000)]
    return sorted(
        stored.passage.sentences[0].text
        for stored in await store.passages(ids)
        if stored.passage.document_id == document_id
    )
