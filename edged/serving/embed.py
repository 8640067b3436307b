"""An embedding model in service: a worker, and the prefixes that tell its model what a text is."""

from collections.abc import Sequence

from edged.models.manifest import Prefixes
from edged.workers.worker import FloatArray, Worker


class LocalEmbedder:
    """An embedding worker; vectors of different identities are never compared."""

    def __init__(self, worker: Worker, identity: str, prefixes: Prefixes) -> None:
        self.worker = worker
        self._identity = identity
        self._prefixes = prefixes

    @property
    def identity(self) -> str:
        return self._identity

    async def embed_plain(self, texts: Sequence[str]) -> tuple[FloatArray, int]:
        """The texts without any prefix: shape (texts, dimensions), and how many tokens they had together."""
        return await self.worker.embed_counted(texts)

    async def embed_question(self, text: str) -> FloatArray:
        """Shape (dimensions,)."""
        vectors = await self.worker.embed([self._prefixes.query + text])
        vector: FloatArray = vectors[0]
        return vector

    async def embed_documents(self, texts: Sequence[str]) -> FloatArray:
        """Shape (texts, dimensions)."""
        return await self.worker.embed([self._prefixes.document + text for text in texts])
