"""From a question to the passages nearest it: by meaning and by keyword, fused by rank."""

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edged.errors import WorkerError
from edged.rag.fuse import fuse
from edged.rag.verify import unsupported_words
from edged.store.keywords import codes
from edged.store.knowledge import KnowledgeStore, StoredPassage

FloatArray = npt.NDArray[np.float32]

RANKED_PER_METHOD = 30
VECTOR_WEIGHT = 1.0
KEYWORD_WEIGHT = 1.0
TELLING_SHARE = 0.6


class Embedder(Protocol):
    """Turns texts into vectors of unit length, and says whose vectors they are."""

    @property
    def identity(self) -> str:
        """Name and checksum of the model; vectors of different identities are never compared."""

    async def embed_question(self, text: str) -> FloatArray:
        """Shape (dimensions,). Raises :class:`WorkerError`."""

    async def embed_documents(self, texts: Sequence[str]) -> FloatArray:
        """Shape (texts, dimensions). Raises :class:`WorkerError`."""


class Retrieval(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Passages, best first, with the cosine of each sentence to the question where vectors exist.

    ``near`` says whether anything found is close enough to be an answer's ground.
    """

    passages: tuple[StoredPassage, ...]
    similarities: tuple[tuple[float | None, ...], ...]
    near: bool
    embed_ms: float
    retrieve_ms: float


class Retriever:
    """Hybrid search over the knowledge store; without an embedder, by keywords alone."""

    def __init__(self, store: KnowledgeStore, embedder: Embedder | None, *, near: float) -> None:
        self._store = store
        self._embedder = embedder
        self._near = near

    async def retrieve(self, question: str, collection: str, limit: int) -> Retrieval:
        """The ``limit`` best passages for a question. Raises :class:`StoreError`."""
        started = time.monotonic()
        vector = await self._embed(question)
        embedded = time.monotonic()
        ranked = await self.rank(question, vector, collection)
        passages = await self._store.passages(ranked.ids[:limit])
        similarities = tuple(_similarities(passage, vector) for passage in passages)
        return Retrieval(
            passages=tuple(passages),
            similarities=similarities,
            near=self._is_near(question, ranked, passages, similarities),
            embed_ms=(embedded - started) * 1e3,
            retrieve_ms=(time.monotonic() - embedded) * 1e3,
        )

    async def rank(self, question: str, vector: FloatArray | None, collection: str) -> "Ranking":
        """Chunk ids by both methods and fused, best first."""
        by_keyword = await self._store.keyword(collection, question, RANKED_PER_METHOD)
        by_vector = [] if vector is None else await self._store.nearest(collection, vector, RANKED_PER_METHOD)
        keyword_ids = [chunk_id for chunk_id, _ in by_keyword]
        vector_ids = [chunk_id for chunk_id, _ in by_vector]
        return Ranking(
            ids=tuple(fuse([(VECTOR_WEIGHT, vector_ids), (KEYWORD_WEIGHT, keyword_ids)])),
            by_vector=tuple(vector_ids),
            by_keyword=tuple(keyword_ids),
            best_cosine=by_vector[0][1] if by_vector else None,
        )

    async def _embed(self, question: str) -> FloatArray | None:
        if self._embedder is None:
            return None
        try:
            return await self._embedder.embed_question(question)
        except WorkerError:
            return None  # the worker's condition is in /health; keywords still find most of it

    def _is_near(
        self,
        question: str,
        ranked: "Ranking",
        passages: Sequence[StoredPassage],
        similarities: Sequence[Sequence[float | None]],
    ) -> bool:
        """A vector close to the question, or a passage with its codes or most of its words."""
        if not passages:
            return False
        texts = [_searchable(passage) for passage in passages]
        asked = codes(question)
        if asked:
            # A fault code or part number that stands nowhere near is not answered with its neighbour's text.
            return any(code.casefold() in text.casefold() for code in asked for text in texts)
        cosines = [value for values in similarities for value in values if value is not None]
        if max([*cosines, ranked.best_cosine or 0.0]) >= self._near:
            return True
        return any(1.0 - unsupported_words(question, [text]) >= TELLING_SHARE for text in texts)


class Ranking(msgspec.Struct, frozen=True):
    """What each method found and what both found together, chunk ids best first."""

    ids: tuple[int, ...]
    by_vector: tuple[int, ...]
    by_keyword: tuple[int, ...]
    best_cosine: float | None


def _similarities(passage: StoredPassage, vector: FloatArray | None) -> tuple[float | None, ...]:
    if vector is None or passage.sentence_vectors is None:
        return (None,) * len(passage.passage.sentences)
    return tuple(float(value) for value in passage.sentence_vectors.astype(np.float32) @ vector)


def _searchable(stored: StoredPassage) -> str:
    passage = stored.passage
    return " ".join([passage.title, *passage.headings, *(sentence.text for sentence in passage.sentences)])
