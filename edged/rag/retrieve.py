"""From a question to the passages nearest it: by keyword, by meaning and by their best sentence, fused by rank."""

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edged.errors import EmbedderMismatchError, WorkerError
from edged.rag.fuse import fuse
from edged.rag.verify import unsupported_words, verify
from edged.serving.pool import EmbedderPool
from edged.store.keywords import codes
from edged.store.knowledge import KnowledgeStore, StoredPassage

FloatArray = npt.NDArray[np.float32]

# The three rankings weigh alike. XQuAD English, R@1 and R@3 on all questions: keyword 0.936 and 0.977, vector 0.887
# and 0.984, these two fused 0.938 and 0.992, with the best sentence 0.954 and 0.995; neither 1.5 for keywords nor
# 0.5 for sentences is better on both halves of the questions. From 5 to 30 passages per method rank alike there;
# 20 leaves room for larger collections.
EMBED_PATIENCE_SECONDS = 10.0
RANKED_PER_METHOD = 20
TELLING_SHARE = 0.6
"""A passage with this share of the question's words is near it, whatever the cosine."""

_SERIES = re.compile(r"([A-Za-z]{1,3})[-_/.]?\d+(?:[-_/.]?[A-Za-z0-9]+)*\Z")


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

    def __init__(self, store: KnowledgeStore, embedders: EmbedderPool, *, near: float) -> None:
        self._store = store
        self._embedders = embedders
        self._near = near

    def use_near(self, near: float) -> None:
        """From the next question on."""
        self._near = near

    async def retrieve(
        self, question: str, collection: str, limit: int, *, seconds_left: float | None = None
    ) -> Retrieval:
        """The ``limit`` best passages for a question. Raises :class:`StoreError`.

        An embedder that is too slow for the time left is not waited for; keywords alone decide then.
        """
        started, least = time.monotonic(), self._near
        patience = EMBED_PATIENCE_SECONDS if seconds_left is None else min(EMBED_PATIENCE_SECONDS, seconds_left / 2)
        try:
            vector, ranked, passages, embedded = await self._find(question, collection, limit, patience)
        except EmbedderMismatchError:  # it was exchanged in this moment
            vector, ranked, passages, embedded = await self._find(question, collection, limit, patience)
        similarities = tuple(_similarities(passage, vector) for passage in passages)
        return Retrieval(
            passages=tuple(passages),
            similarities=similarities,
            near=_is_near(question, ranked, passages, similarities, least),
            embed_ms=(embedded - started) * 1e3,
            retrieve_ms=(time.monotonic() - embedded) * 1e3,
        )

    async def _find(
        self, question: str, collection: str, limit: int, patience_seconds: float
    ) -> tuple[FloatArray | None, "Ranking", list[StoredPassage], float]:
        """The question's vector, what was found with it, the best of that, and when the vector was there."""
        vector, embedder = await self._embed(question, patience_seconds)
        embedded = time.monotonic()
        ranked = await self.rank(question, vector, collection, embedder=embedder)
        return vector, ranked, await self._store.passages(ranked.ids[:limit], embedder=embedder), embedded

    async def rank(
        self, question: str, vector: FloatArray | None, collection: str, *, embedder: str | None = None
    ) -> "Ranking":
        """Chunk ids by each method and fused, best first.

        Raises :class:`EmbedderMismatchError` when ``embedder``, who made the vector, is not in use.
        """
        found = await self._store.keyword(collection, question, RANKED_PER_METHOD)
        by_keyword = tuple(chunk_id for chunk_id, _ in found)
        if vector is None:
            return Ranking(by_keyword, by_keyword=by_keyword)
        nearest = await self._store.nearest(collection, vector, RANKED_PER_METHOD, embedder=embedder)
        by_vector = tuple(chunk_id for chunk_id, _ in nearest)
        by_sentence = by_best_sentence(
            vector, await self._store.passages(tuple(dict.fromkeys((*by_keyword, *by_vector))), embedder=embedder)
        )
        return Ranking(
            tuple(fuse([(1.0, by_keyword), (1.0, by_vector), (1.0, by_sentence)])),
            by_keyword=by_keyword,
            by_vector=by_vector,
            best_cosine=nearest[0][1] if nearest else None,
        )

    async def _embed(self, question: str, patience_seconds: float) -> tuple[FloatArray | None, str | None]:
        """The question's vector and who made it."""
        try:
            async with asyncio.timeout(patience_seconds), self._embedders.lease() as embedder:
                return await embedder.embed_question(question), embedder.identity
        except (WorkerError, TimeoutError):
            return None, None  # the worker's condition is in /health; keywords still find most of it


def _is_near(
    question: str,
    ranked: "Ranking",
    passages: Sequence[StoredPassage],
    similarities: Sequence[Sequence[float | None]],
    least: float,
) -> bool:
    """A passage with the question's codes; where it names none, a vector close to it or most of its words.

    ``least`` is the cosine of what is close. A fault code or part number that stands nowhere near is not answered with
    its neighbour's text.
    """
    if not passages:
        return False
    texts = [_searchable(passage) for passage in passages]
    if (asked := named_codes(question)) and not holds_codes(asked, texts):
        return False
    cosines = [value for values in similarities for value in values if value is not None]
    if asked or max([*cosines, ranked.best_cosine or 0.0]) >= least:
        return True
    return any(1.0 - unsupported_words(question, [text]) >= TELLING_SHARE for text in texts)


def named_codes(question: str) -> list[str]:
    """The fault codes, part and type numbers of a question: ``E-217``; but not ``20th``, ``4-20`` or ``pump-2``."""
    return [code for code in codes(question) if _SERIES.match(code)]


def holds_codes(asked: Sequence[str], texts: Sequence[str]) -> bool:
    """Whether the texts hold what the codes name: at least one of them, and none is missing from its own series.

    Where E-217 stands and E-999 was asked, E-999 is not there; but a plant's tag that no manual uses is no reason
    to find nothing.
    """
    missing = [code for code in asked if verify(code, texts)]
    listed = {_series(code) for text in texts for code in named_codes(text)}
    return len(missing) < len(asked) and not any(_series(code) in listed for code in missing)


def _series(code: str) -> str:
    """The letters a code begins with."""
    found = _SERIES.match(code)
    return found[1].upper() if found else ""


class Ranking(msgspec.Struct, frozen=True):
    """What each method found and what they found together (``ids``), chunk ids best first."""

    ids: tuple[int, ...]
    by_keyword: tuple[int, ...]
    by_vector: tuple[int, ...] = ()
    best_cosine: float | None = None


def by_best_sentence(vector: FloatArray, passages: Sequence[StoredPassage]) -> list[int]:
    """Chunk ids by the cosine of each one's best sentence to the question, best first, ties to the smaller id.

    A passage about the right subject is near as a whole; the one that answers has a sentence that is nearer still.
    Passages with vectors of another embedder are left out.
    """
    best = {
        passage.passage.chunk_id: max(cosine for cosine in _similarities(passage, vector) if cosine is not None)
        for passage in passages
        if passage.sentence_vectors is not None and len(passage.sentence_vectors)
    }
    return sorted(best, key=lambda chunk_id: (-best[chunk_id], chunk_id))


def _similarities(passage: StoredPassage, vector: FloatArray | None) -> tuple[float | None, ...]:
    if vector is None or passage.sentence_vectors is None:
        return (None,) * len(passage.passage.sentences)
    return tuple(float(value) for value in passage.sentence_vectors.astype(np.float32) @ vector)


def _searchable(stored: StoredPassage) -> str:
    passage = stored.passage
    return " ".join([passage.title, *passage.headings, *(sentence.text for sentence in passage.sentences)])
