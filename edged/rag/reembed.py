"""Embedding anew what is stored, for a candidate embedder, in the background and beside documents that come."""

import asyncio
import time
from collections.abc import Callable

from edged.rag.ingest import embed_chunks
from edged.rag.retrieve import Embedder
from edged.store.knowledge import EmbeddedChunk, KnowledgeStore, StoredChunk

CHUNKS_PER_BATCH = 8
REST = 1.0
"""After a batch it rests this many times as long as the batch took: questions and events go first."""

Progress = Callable[[int, int], None]


class Collections:
    """All collections, as a change of the embedder sees them."""

    def __init__(self, store: KnowledgeStore) -> None:
        self._store = store

    async def embed_all(self, embedder: Embedder, progress: Progress) -> None:
        """Make the candidate's vectors of all chunks there are now; ``progress`` hears how many are done, of how many.

        What an earlier, interrupted run has made is used. Raises :class:`WorkerError` and :class:`StoreError`.
        """
        identity, newest, last = embedder.identity, await self._store.newest_chunk(), 0
        progress(*await self._store.begin_staging(identity))
        while batch := await self._store.unstaged(identity, CHUNKS_PER_BATCH, after=last, up_to=newest):
            began, last = time.monotonic(), batch[-1].id
            embedded = [(chunk.id, await _embed(embedder, chunk)) for chunk in batch]
            progress(*await self._store.stage(identity, embedded))
            await asyncio.sleep(REST * (time.monotonic() - began))

    async def switch(self, identity: str, dimensions: int) -> bool:
        """Search the candidate's vectors from now on; False, and no change, when chunks came meanwhile."""
        return await self._store.switch_embedder(identity, dimensions) == 0

    async def forget(self) -> None:
        """The candidate is none any more."""
        await self._store.drop_staged()

    async def switched_to(self) -> str | None:
        """The embedder switched to last, where that is not :meth:`noted` yet."""
        return await self._store.switched_to()

    async def noted(self) -> None:
        """The switch is remembered where the choice of models is kept."""
        await self._store.switch_noted()


async def _embed(embedder: Embedder, stored: StoredChunk) -> EmbeddedChunk:
    (embedded,) = await embed_chunks(embedder, stored.title, [stored.chunk])
    return embedded
