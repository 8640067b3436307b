"""From a document's text to its indexed chunks; the documents as the doors see them."""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edged.errors import DocumentNotFoundError, EmbedderMismatchError, RequestError
from edged.rag.chunk import Format, chunk_document
from edged.rag.retrieve import Embedder, FloatArray
from edged.serving.pool import EmbedderPool
from edged.store.knowledge import EmbeddedChunk, KnowledgeStore
from edged.types import Chunk, DocumentInfo, Ingested

TEXTS_PER_REQUEST = 64
LONGEST_TITLE_CHARACTERS = 512


class Upload(NamedTuple):
    """A document as it came."""

    collection: str
    id: str
    title: str
    format: Format
    text: str
    sha256: str


class Library:
    """Adds, lists and removes documents."""

    def __init__(self, store: KnowledgeStore, embedders: EmbedderPool) -> None:
        self._store = store
        self._embedders = embedders

    async def add(
        self, *, collection: str, document_id: str | None, title: str | None, format: str, text: str
    ) -> Ingested:
        """Index a document; one that is stored already, unchanged, costs one look-up.

        Raises :class:`RequestError` for a text without content, :class:`WorkerError` when it cannot be embedded,
        :class:`StoreError` when it cannot be stored. Nothing is changed then.
        """
        kind: Format = "markdown" if format == "markdown" else "text"
        title = title or _title(text, kind)
        sha256 = _fingerprint(title, kind, text)
        document = Upload(collection, document_id or sha256[:16], title, kind, text, sha256)
        try:
            return await self._put(document)
        except EmbedderMismatchError:  # the embedder was exchanged meanwhile
            return await self._put(document)

    async def _put(self, document: "Upload") -> Ingested:
        async with self._embedders.lease() as embedder:
            place, sha256 = (document.collection, document.id), document.sha256
            if await self._store.is_current(*place, sha256, embedder.identity):
                return Ingested(document=await self.get(*place), outcome="unchanged")
            chunks = chunk_document(document.text, document.format)
            if not chunks:
                raise RequestError(f"document '{document.id}' has no text to index", hint="send text with words in it")
            return await self._store.put(
                collection=document.collection,
                document_id=document.id,
                title=document.title,
                format=document.format,
                text=document.text,
                sha256=sha256,
                embedder=embedder.identity,
                chunks=await embed_chunks(embedder, document.title, chunks),
            )

    async def remove(self, collection: str, document_id: str) -> None:
        """Forget a document. Raises :class:`DocumentNotFoundError`."""
        await self._store.remove(collection, document_id)

    async def list(self, collection: str | None) -> list[DocumentInfo]:
        """Documents of one collection or all."""
        return await self._store.documents(collection)

    async def get(self, collection: str, document_id: str) -> DocumentInfo:
        """One document. Raises :class:`DocumentNotFoundError`."""
        found = await self._store.find(collection, document_id)
        if found is None:
            raise DocumentNotFoundError(
                f"there is no document '{document_id}' in collection '{collection}'", hint="see GET /v1/documents"
            )
        return found


async def embed_chunks(embedder: Embedder, title: str, chunks: Sequence[Chunk]) -> list[EmbeddedChunk]:
    """Each chunk as one vector under its headings, and each of its sentences as another."""
    texts = []
    for chunk in chunks:
        texts.append("\n".join([title, *chunk.headings, chunk.text]))
        texts += [sentence.text for sentence in chunk.sentences]
    vectors = await _vectors(embedder, texts)
    embedded, position = [], 0
    for chunk in chunks:
        end = position + 1 + len(chunk.sentences)
        embedded.append(EmbeddedChunk(chunk, vectors[position], vectors[position + 1 : end]))
        position = end
    return embedded


async def _vectors(embedder: Embedder, texts: Sequence[str]) -> FloatArray:
    parts = [
        await embedder.embed_documents(texts[start : start + TEXTS_PER_REQUEST])
        for start in range(0, len(texts), TEXTS_PER_REQUEST)
    ]
    return np.concatenate(parts)


def _fingerprint(title: str, format: str, text: str) -> str:
    return hashlib.sha256("\0".join([title, format, text]).encode("utf-8", "surrogatepass")).hexdigest()


def _title(text: str, format: Format) -> str:
    """The first heading or line with a word in it."""
    for line in text.splitlines():
        if re.search(r"\w", line):
            shown = line.strip()
            return (shown.lstrip("# ") if format == "markdown" else shown)[:LONGEST_TITLE_CHARACTERS]
    return "untitled"
