"""The documents: their texts, chunks, vectors and keywords, in one file that only this module touches.

The vector indexes in memory are derived from the rows and change only when a commit has changed those.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edged.errors import DocumentNotFoundError, EmbedderMismatchError, StoreError
from edged.store.database import Database
from edged.store.keywords import index_text, match_query
from edged.store.vectors import FloatArray, VectorIndex
from edged.types import Chunk, DocumentInfo, Ingested, Passage, Sentence

# On the English half of XQuAD, weights of title and headings from 0.5 to 2 find alike; 0 and 4 find less.
HEADINGS_WEIGHT = 1.0
TEXT_WEIGHT = 1.0

_LOAD_ROWS = 1024


class EmbeddedChunk(msgspec.Struct, frozen=True, eq=False):
    """A chunk and its unit vectors: ``vector`` (dimensions,), ``sentence_vectors`` (sentences, dimensions)."""

    chunk: Chunk
    vector: FloatArray
    sentence_vectors: FloatArray


class StoredPassage(msgspec.Struct, frozen=True, eq=False):
    """A passage and the vectors of its sentences, (sentences, dimensions); None when of another embedder."""

    passage: Passage
    sentence_vectors: FloatArray | None


class StoredChunk(msgspec.Struct, frozen=True):
    """A chunk as it was embedded: ``title`` is its document's."""

    id: int
    title: str
    chunk: Chunk


class _Document(NamedTuple):
    collection: str
    id: str
    title: str
    format: str
    text: str
    sha256: str
    embedder: str
    chunks: Sequence[EmbeddedChunk]


class _Change(NamedTuple):
    """What a committed write did to the chunks of one collection."""

    collection: str
    gone: list[int]
    added: list[int]


class _Vectors:
    """The indexes of one embedder's vectors, by collection."""

    def __init__(self, embedder: str, dimensions: int) -> None:
        self.embedder = embedder
        self.dimensions = dimensions
        self._indexes: dict[str, VectorIndex] = {}

    def __len__(self) -> int:
        return sum(len(index) for index in self._indexes.values())

    def replace(self, collection: str, gone: Sequence[int], ids: Sequence[int], vectors: FloatArray) -> None:
        index = self._indexes.setdefault(collection, VectorIndex(self.dimensions))
        index.replace(gone, ids, vectors)

    def search(self, collection: str, vector: FloatArray, limit: int) -> list[tuple[int, float]]:
        index = self._indexes.get(collection)
        return index.search(vector, limit) if index is not None else []


class KnowledgeStore:
    """Documents by collection and id, found by vector and by keyword.

    Every change of a document is one transaction in the database's writer thread, and the vector indexes follow
    in that thread, in the same order: they always equal the rows, whoever writes at the same time. Every method
    raises :class:`StoreClosedError` after :meth:`close`, and :class:`StoreError` when the disk fails.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives Unix time in seconds; :meth:`open` makes the database."""
        self._database = database
        self._clock = clock
        self._vectors: _Vectors | None = None  # replaced as a whole, and only in the writer thread

    @classmethod
    async def open(cls, path: Path) -> "KnowledgeStore":
        """Open or create the file. Vectors are searched once :meth:`use_embedder` has said whose."""
        return cls(await Database.open(path, files("edged.store") / "migrations"))

    @property
    def database(self) -> Database:
        """knowledge.db itself, for those who ask how it is."""
        return self._database

    async def use_embedder(self, identity: str, dimensions: int) -> int:
        """Search the vectors of this embedder only, from now on, and take documents only with such.

        Returns how many chunks have vectors of another one: these are left out, never mixed in.
        """

        def load(connection: sqlite3.Connection) -> tuple[_Vectors, int]:
            if _meta(connection, _IN_USE) != identity:  # a start on a full disk writes nothing
                _set_meta(connection, _IN_USE, identity)
            vectors = _load(connection, identity, dimensions)
            return vectors, _one(connection, "SELECT count(*) FROM chunks") - len(vectors)

        _, others = await self._database.write(load, on_commit=self._adopt)
        return others

    async def find(self, collection: str, document_id: str) -> DocumentInfo | None:
        """The document, or None when there is none of this id."""

        def work(connection: sqlite3.Connection) -> DocumentInfo | None:
            return next(_documents(connection, "WHERE c.name = ? AND d.id = ?", (collection, document_id)), None)

        return await self._database.read(work)

    async def is_current(self, collection: str, document_id: str, sha256: str, embedder: str) -> bool:
        """Whether the document is stored with this content, embedded by this embedder."""

        def work(connection: sqlite3.Connection) -> bool:
            row = _document_row(connection, collection, document_id, "d.sha256, d.embedder")
            return row == (sha256, embedder)

        return await self._database.read(work)

    async def put(
        self,
        *,
        collection: str,
        document_id: str,
        title: str,
        format: str,
        text: str,
        sha256: str,
        embedder: str,
        chunks: Sequence[EmbeddedChunk],
    ) -> Ingested:
        """Store a document in place of the one of this id, making the collection where needed; all or nothing.

        Raises :class:`EmbedderMismatchError` when the vectors are not those of the embedder in use.
        """
        document = _Document(collection, document_id, title, format, text, sha256, embedder, chunks)

        def work(connection: sqlite3.Connection) -> tuple[Ingested, _Change]:
            _check_embedder(document, _meta(connection, _IN_USE))
            _check_vectors(document, self._vectors)
            return _replace_document(connection, document, self._clock())

        def follow(result: tuple[Ingested, _Change]) -> None:
            self._follow(result[1], embedder, chunks)

        ingested, _ = await self._database.write(work, on_commit=follow)
        return ingested

    async def remove(self, collection: str, document_id: str) -> None:
        """Delete a document with all that was made of it. Raises :class:`DocumentNotFoundError`."""

        def work(connection: sqlite3.Connection) -> _Change:
            row = _document_row(connection, collection, document_id, "d.collection_id")
            if row is None:
                raise _not_found(collection, document_id)
            return _Change(collection, _delete_document(connection, row[0], document_id), [])

        await self._database.write(work, on_commit=self._follow)

    async def documents(self, collection: str | None = None) -> list[DocumentInfo]:
        """All documents, or those of one collection, by collection and id."""
        condition, values = ("", ()) if collection is None else ("WHERE c.name = ?", (collection,))
        return await self._database.read(lambda connection: list(_documents(connection, condition, values)))

    async def text(self, collection: str, document_id: str) -> str:
        """The document's text as it was added. Raises :class:`DocumentNotFoundError`."""

        def work(connection: sqlite3.Connection) -> str:
            row = _document_row(connection, collection, document_id, "d.text")
            if row is None:
                raise _not_found(collection, document_id)
            return str(row[0])

        return await self._database.read(work)

    async def collections(self) -> list[str]:
        """The names of all collections, sorted; one stays when its last document is removed."""

        def work(connection: sqlite3.Connection) -> list[str]:
            return [row[0] for row in connection.execute("SELECT name FROM collections ORDER BY name")]

        return await self._database.read(work)

    async def nearest(
        self, collection: str, vector: FloatArray, limit: int, *, embedder: str | None = None
    ) -> list[tuple[int, float]]:
        """Up to ``limit`` (chunk id, cosine) nearest to the unit ``vector``, (dimensions,), best first.

        Empty for an unknown collection, or before an embedder is in use.
        Raises :class:`EmbedderMismatchError` when the vector has other dimensions than the embedder in use, or was made
        by another ``embedder``.
        """
        vectors = self._vectors
        if vectors is None:
            return []
        if embedder is not None:
            _require(embedder, vectors.embedder)
        if vector.shape != (vectors.dimensions,):
            raise EmbedderMismatchError(
                f"the question's vector has shape {vector.shape}, {vectors.embedder} makes ({vectors.dimensions},)",
                embedder=vectors.embedder,
                dimensions=vectors.dimensions,
            )
        # The pool's threads do it, so that searches are bounded like all other reads.
        return await self._database.read(lambda _: vectors.search(collection, vector, limit))

    async def keyword(self, collection: str, question: str, limit: int) -> list[tuple[int, float]]:
        """Up to ``limit`` (chunk id, BM25 score) that share words with ``question``, best first; higher is better.

        Empty for an unknown collection. How rare a word is counts over all collections.
        """
        query = match_query(question)
        return await self._database.read(lambda connection: _keyword(connection, collection, query, limit))

    async def passages(self, chunk_ids: Sequence[int], *, embedder: str | None = None) -> list[StoredPassage]:
        """The chunks in the order asked; those gone meanwhile are left out. Their vectors are of the embedder in use.

        Raises :class:`EmbedderMismatchError` when that is not ``embedder``.
        """
        in_memory = self._vectors.embedder if self._vectors is not None else None

        def work(connection: sqlite3.Connection) -> list[StoredPassage]:
            if embedder is not None:
                _require(embedder, _meta(connection, _IN_USE))
            passages = _passages(connection, chunk_ids, embedder or in_memory)
            found = {passage.passage.chunk_id: passage for passage in passages}
            return [found[chunk_id] for chunk_id in chunk_ids if chunk_id in found]

        return await self._database.read(work)

    async def counts(self) -> tuple[int, int]:
        """How many documents and chunks there are."""

        def work(connection: sqlite3.Connection) -> tuple[int, int]:
            return _one(connection, "SELECT count(*) FROM documents"), _one(connection, "SELECT count(*) FROM chunks")

        return await self._database.read(work)

    # --- another embedder --------------------------------------------------------------------------

    async def begin_staging(self, embedder: str) -> tuple[int, int]:
        """Make room for the vectors of a candidate embedder; those of an earlier candidate are dropped.

        Returns how many chunks it has embedded already, before a restart, and how many there are.
        """

        def work(connection: sqlite3.Connection) -> tuple[int, int]:
            connection.execute("DELETE FROM staged_vectors WHERE embedder <> ?", (embedder,))
            return _staged(connection, embedder)

        return await self._database.write(work)

    async def newest_chunk(self) -> int:
        """The highest chunk id there is; 0 for none."""
        return await self._database.read(lambda connection: _one(connection, "SELECT ifnull(max(id), 0) FROM chunks"))

    async def unstaged(self, embedder: str, limit: int, *, after: int = 0, up_to: int) -> list[StoredChunk]:
        """Chunks that the candidate has not embedded yet, by id: above ``after`` and no higher than ``up_to``."""
        return await self._database.read(lambda connection: list(_unstaged(connection, embedder, after, up_to, limit)))

    async def stage(self, embedder: str, embedded: Sequence[tuple[int, EmbeddedChunk]]) -> tuple[int, int]:
        """Keep vectors of the candidate, by chunk id; chunks that went meanwhile are left out. Returns as
        :meth:`begin_staging` does."""

        def work(connection: sqlite3.Connection) -> tuple[int, int]:
            for chunk_id, vectors in embedded:
                _stage(connection, chunk_id, embedder, vectors)
            return _staged(connection, embedder)

        return await self._database.write(work)

    async def drop_staged(self) -> None:
        """Forget what candidates have embedded."""
        await self._database.write(lambda connection: connection.execute("DELETE FROM staged_vectors"))

    async def switch_embedder(self, identity: str, dimensions: int) -> int:
        """Use the candidate's vectors in place of all others, in one transaction: a search sees those of one embedder.

        Returns how many chunks it has not embedded yet; with any, nothing is changed.
        """

        def work(connection: sqlite3.Connection) -> tuple[_Vectors | None, int]:
            done, chunks = _staged(connection, identity)
            if done < chunks:
                return None, chunks - done
            _switch(connection, identity)
            return _load(connection, identity, dimensions), 0

        def follow(result: tuple[_Vectors | None, int]) -> None:
            if result[0] is not None:
                self._vectors = result[0]

        _, missing = await self._database.write(work, on_commit=follow)
        return missing

    async def switched_to(self) -> str | None:
        """The embedder of a switch that nobody has said to be noted elsewhere."""
        return await self._database.read(lambda connection: _meta(connection, _SWITCHED_TO))

    async def switch_noted(self) -> None:
        """The switch is known elsewhere, and need not be remembered here."""
        await self._database.write(
            lambda connection: connection.execute("DELETE FROM meta WHERE key = ?", (_SWITCHED_TO,))
        )

    async def check(self) -> list[str]:
        """What is wrong with the file, its keyword index or the vectors in memory; empty when all is well."""
        return await self._database.check() + await self._database.write(self._check_indexes)

    async def close(self) -> None:
        """Finish what is queued and release the file. Idempotent."""
        await self._database.close()

    # --- in the writer thread, after a commit ------------------------------------------------------

    def _adopt(self, loaded: tuple[_Vectors, int]) -> None:
        self._vectors = loaded[0]

    def _follow(self, change: _Change, embedder: str | None = None, chunks: Sequence[EmbeddedChunk] = ()) -> None:
        vectors = self._vectors
        if vectors is None:
            return
        if embedder != vectors.embedder:  # a removal; or a switch of the embedder was committed just before
            chunks, change = (), change._replace(added=[])
        added = (
            np.stack([chunk.vector for chunk in chunks]) if chunks else np.empty((0, vectors.dimensions), np.float32)
        )
        vectors.replace(change.collection, change.gone, change.added, added)

    # --- in the writer thread ----------------------------------------------------------------------

    def _check_indexes(self, connection: sqlite3.Connection) -> list[str]:
        found = []
        try:
            connection.execute("INSERT INTO chunks_fts (chunks_fts) VALUES ('integrity-check')")
        except sqlite3.DatabaseError as error:
            found.append(f"the keyword index is damaged: {error}")
        missing = _one(connection, "SELECT count(*) FROM chunks WHERE id NOT IN (SELECT rowid FROM chunks_fts)")
        if missing:
            found.append(f"{missing} chunks are missing in the keyword index")
        vectors = self._vectors
        if vectors is not None and len(vectors) != (
            stored := _one(connection, f"SELECT count(*) {_USABLE}", (vectors.embedder, vectors.dimensions))
        ):
            found.append(f"{len(vectors)} vectors are in memory but {stored} in the file")
        return found


# --- vectors ---------------------------------------------------------------------------------------

_USABLE = "FROM vectors WHERE embedder = ? AND dimensions = ?"


def _load(connection: sqlite3.Connection, embedder: str, dimensions: int) -> _Vectors:
    vectors = _Vectors(embedder, dimensions)
    for collection_id, name in connection.execute("SELECT id, name FROM collections").fetchall():
        rows = connection.execute(
            """
            SELECT v.chunk_id, v.vector FROM chunks AS k JOIN vectors AS v ON v.chunk_id = k.id
            WHERE k.collection_id = ? AND v.embedder = ? AND v.dimensions = ? ORDER BY k.id
            """,
            (collection_id, embedder, dimensions),
        )
        while batch := rows.fetchmany(_LOAD_ROWS):
            matrix = np.frombuffer(b"".join(row[1] for row in batch), "<f4").reshape(len(batch), dimensions)
            vectors.replace(name, (), [row[0] for row in batch], matrix)
    return vectors


def _check_embedder(document: _Document, in_use: str | None) -> None:
    """A switch may stand in the same transaction, before the vectors in memory have followed it."""
    if document.embedder != in_use:
        raise EmbedderMismatchError(
            f"'{document.id}' was embedded by {document.embedder}, in use is {in_use or 'none'}",
            hint="embed the document again with the embedder in use",
            document=document.id,
            embedder=document.embedder,
            in_use=in_use,
        )


def _check_vectors(document: _Document, vectors: _Vectors | None) -> None:
    _check_embedder(document, vectors.embedder if vectors is not None else None)
    assert vectors is not None
    for embedded in document.chunks:
        _check_shape(embedded, vectors.dimensions, document)


def _check_shape(embedded: EmbeddedChunk, dimensions: int, document: _Document) -> None:
    sentences = len(embedded.chunk.sentences)
    if embedded.vector.shape != (dimensions,) or embedded.sentence_vectors.shape != (sentences, dimensions):
        raise EmbedderMismatchError(
            f"vectors of '{document.id}' have shapes {embedded.vector.shape} and {embedded.sentence_vectors.shape}, "
            f"not ({dimensions},) and ({sentences}, {dimensions})",
            document=document.id,
            embedder=document.embedder,
        )
    if not np.isfinite(embedded.vector).all():
        raise StoreError(
            f"{document.embedder} made a vector with NaN or infinity for '{document.id}'",
            hint="the model file may be damaged: run 'edged models pull'",
            document=document.id,
            chunk=embedded.chunk.ordinal,
        )


def _packed(array: FloatArray, dtype: str) -> bytes:
    return array.astype(dtype).tobytes()


def _unpacked_halves(blob: bytes, dimensions: int) -> FloatArray:
    halves: NDArray[np.float16] = np.frombuffer(blob, "<f2")
    return halves.reshape(-1, dimensions).astype(np.float32)


# --- another embedder ------------------------------------------------------------------------------

_IN_USE = "embedder_in_use"
_SWITCHED_TO = "embedder_switched_to"


def _meta(connection: sqlite3.Connection, key: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else str(row[0])


def _set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))


def _require(embedder: str, in_use: str | None) -> None:
    if embedder != in_use:
        raise EmbedderMismatchError(
            f"the question was embedded by {embedder}, in use is {in_use or 'none'}", embedder=embedder, in_use=in_use
        )


def _staged(connection: sqlite3.Connection, embedder: str) -> tuple[int, int]:
    done = _one(connection, "SELECT count(*) FROM staged_vectors WHERE embedder = ?", (embedder,))
    return done, _one(connection, "SELECT count(*) FROM chunks")


def _unstaged(
    connection: sqlite3.Connection, embedder: str, after: int, up_to: int, limit: int
) -> Iterator[StoredChunk]:
    rows = connection.execute(
        """
        SELECT k.id, d.title, k.ordinal, k.headings, k.sentences FROM chunks AS k
        JOIN documents AS d ON d.collection_id = k.collection_id AND d.id = k.document_id
        WHERE k.id > ? AND k.id <= ?
          AND NOT EXISTS (SELECT 1 FROM staged_vectors AS s WHERE s.chunk_id = k.id AND s.embedder = ?)
        ORDER BY k.id LIMIT ?
        """,
        (after, up_to, embedder, limit),
    )
    for chunk_id, title, ordinal, headings, sentences in rows:
        yield StoredChunk(chunk_id, title, Chunk(ordinal, tuple(json.loads(headings)), _sentences(sentences)))


def _stage(connection: sqlite3.Connection, chunk_id: int, embedder: str, embedded: EmbeddedChunk) -> None:
    connection.execute(
        """
        INSERT OR REPLACE INTO staged_vectors (chunk_id, embedder, dimensions, vector, sentence_vectors)
        SELECT id, ?, ?, ?, ? FROM chunks WHERE id = ?
        """,
        (
            embedder,
            len(embedded.vector),
            _packed(embedded.vector, "<f4"),
            _packed(embedded.sentence_vectors, "<f2"),
            chunk_id,
        ),
    )


def _switch(connection: sqlite3.Connection, identity: str) -> None:
    connection.execute("DELETE FROM vectors")
    connection.execute(
        "INSERT INTO vectors (chunk_id, embedder, dimensions, vector, sentence_vectors)"
        " SELECT chunk_id, embedder, dimensions, vector, sentence_vectors FROM staged_vectors"
        " WHERE embedder = ?",
        (identity,),
    )
    connection.execute("DELETE FROM staged_vectors")
    connection.execute("UPDATE documents SET embedder = ?", (identity,))
    _set_meta(connection, _IN_USE, identity)
    _set_meta(connection, _SWITCHED_TO, identity)


# --- documents -------------------------------------------------------------------------------------


def _replace_document(connection: sqlite3.Connection, document: _Document, now: float) -> tuple[Ingested, _Change]:
    connection.execute("INSERT INTO collections (name) VALUES (?) ON CONFLICT DO NOTHING", (document.collection,))
    collection_id = _one(connection, "SELECT id FROM collections WHERE name = ?", (document.collection,))
    existed = _document_row(connection, document.collection, document.id, "d.id") is not None
    gone = _delete_document(connection, collection_id, document.id)
    size_bytes = len(document.text.encode("utf-8"))
    connection.execute(
        """
        INSERT INTO documents (collection_id, id, title, format, sha256, text, bytes, embedder, added_at)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            collection_id,
            document.id,
            document.title,
            document.format,
            document.sha256,
            document.text,
            size_bytes,
            document.embedder,
            now,
        ),
    )
    added = [_insert_chunk(connection, collection_id, document, embedded) for embedded in document.chunks]
    info = DocumentInfo(
        id=document.id,
        collection=document.collection,
        title=document.title,
        format=document.format,
        sha256=document.sha256,
        bytes=size_bytes,
        chunks=len(added),
        added_at=now,
    )
    ingested = Ingested(document=info, outcome="replaced" if existed else "added")
    return ingested, _Change(document.collection, gone, added)


def _insert_chunk(
    connection: sqlite3.Connection, collection_id: int, document: _Document, embedded: EmbeddedChunk
) -> int:
    chunk = embedded.chunk
    chunk_id = connection.execute(
        "INSERT INTO chunks (collection_id, document_id, ordinal, headings, sentences) VALUES (?, ?, ?, ?, ?)",
        (
            collection_id,
            document.id,
            chunk.ordinal,
            json.dumps(chunk.headings, ensure_ascii=False),
            msgspec.msgpack.encode([(sentence.text, sentence.start, sentence.end) for sentence in chunk.sentences]),
        ),
    ).lastrowid
    assert chunk_id is not None
    connection.execute(
        "INSERT INTO vectors (chunk_id, embedder, dimensions, vector, sentence_vectors) VALUES (?, ?, ?, ?, ?)",
        (
            chunk_id,
            document.embedder,
            len(embedded.vector),
            _packed(embedded.vector, "<f4"),
            _packed(embedded.sentence_vectors, "<f2"),
        ),
    )
    connection.execute(
        "INSERT INTO chunks_fts (rowid, headings, text) VALUES (?, ?, ?)",
        (chunk_id, index_text("\n".join((document.title, *chunk.headings))), index_text(chunk.text)),
    )
    return chunk_id


def _delete_document(connection: sqlite3.Connection, collection_id: int, document_id: str) -> list[int]:
    """Delete the document where there is one; the ids its chunks had."""
    key = (collection_id, document_id)
    chunks = connection.execute("SELECT id FROM chunks WHERE collection_id = ? AND document_id = ?", key).fetchall()
    connection.execute("DELETE FROM documents WHERE collection_id = ? AND id = ?", key)
    return [row[0] for row in chunks]


def _document_row(
    connection: sqlite3.Connection, collection: str, document_id: str, columns: str
) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = connection.execute(
        f"SELECT {columns} FROM documents AS d JOIN collections AS c ON c.id = d.collection_id "  # noqa: S608 - ours
        "WHERE c.name = ? AND d.id = ?",
        (collection, document_id),
    ).fetchone()
    return row


def _documents(connection: sqlite3.Connection, condition: str, values: tuple[str, ...]) -> Iterator[DocumentInfo]:
    rows = connection.execute(
        f"""
        SELECT d.id, c.name, d.title, d.format, d.sha256, d.bytes, d.added_at,
               (SELECT count(*) FROM chunks AS k WHERE k.collection_id = d.collection_id AND k.document_id = d.id)
        FROM documents AS d JOIN collections AS c ON c.id = d.collection_id {condition} ORDER BY c.name, d.id
        """,  # noqa: S608 - the condition is ours
        values,
    )
    for document_id, collection, title, text_format, sha256, size_bytes, added_at, chunks in rows:
        yield DocumentInfo(
            id=document_id,
            collection=collection,
            title=title,
            format=text_format,
            sha256=sha256,
            bytes=size_bytes,
            chunks=chunks,
            added_at=added_at,
        )


def _not_found(collection: str, document_id: str) -> DocumentNotFoundError:
    return DocumentNotFoundError(
        f"there is no document '{document_id}' in collection '{collection}'",
        hint="'edged docs list' shows what there is",
        collection=collection,
        document=document_id,
    )


# --- retrieval -------------------------------------------------------------------------------------


def _keyword(connection: sqlite3.Connection, collection: str, query: str, limit: int) -> list[tuple[int, float]]:
    rows = connection.execute(
        """
        SELECT k.id, -bm25(chunks_fts, ?, ?) AS score
        FROM chunks_fts JOIN chunks AS k ON k.id = chunks_fts.rowid JOIN collections AS c ON c.id = k.collection_id
        WHERE chunks_fts MATCH ? AND c.name = ? ORDER BY score DESC, k.id LIMIT ?
        """,
        (HEADINGS_WEIGHT, TEXT_WEIGHT, query, collection, max(limit, 0)),
    )
    return [(chunk_id, score) for chunk_id, score in rows]


def _passages(
    connection: sqlite3.Connection, chunk_ids: Sequence[int], embedder: str | None
) -> Iterator[StoredPassage]:
    rows = connection.execute(
        """
        SELECT k.id, k.document_id, d.title, k.headings, k.sentences, v.embedder, v.dimensions, v.sentence_vectors
        FROM chunks AS k
        JOIN documents AS d ON d.collection_id = k.collection_id AND d.id = k.document_id
        JOIN vectors AS v ON v.chunk_id = k.id
        WHERE k.id IN (SELECT value FROM json_each(?))
        """,
        (json.dumps([int(chunk_id) for chunk_id in chunk_ids]),),
    )
    for chunk_id, document_id, title, headings, sentences, embedded_by, dimensions, blob in rows:
        passage = Passage(chunk_id, document_id, title, tuple(json.loads(headings)), _sentences(sentences))
        vectors = _unpacked_halves(blob, dimensions) if embedded_by == embedder else None
        yield StoredPassage(passage, vectors)


def _sentences(blob: bytes) -> tuple[Sentence, ...]:
    rows = msgspec.msgpack.decode(blob, type=list[tuple[str, int, int]])
    return tuple(Sentence(text, start, end) for text, start, end in rows)


def _one(connection: sqlite3.Connection, query: str, values: tuple[object, ...] = ()) -> int:
    return int(connection.execute(query, values).fetchone()[0])
