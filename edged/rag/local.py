"""The two models as the rag layer uses them: a worker with a name, a prompt format, an identity."""

from collections.abc import AsyncGenerator, Sequence

from edged.models.manifest import Prefixes
from edged.models.template import ChatTemplate
from edged.rag.retrieve import FloatArray
from edged.types import Segment
from edged.workers.protocol import Finished, Piece
from edged.workers.worker import Lost, Worker


class LocalChat:
    """A chat worker and the prompt format of its model."""

    def __init__(self, worker: Worker, template: ChatTemplate, name: str) -> None:
        self._worker = worker
        self._template = template
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def render(self, messages: Sequence[tuple[str, str]]) -> list[Segment]:
        return self._template.render(messages)

    def generate(
        self, prompt: Sequence[Segment], *, max_tokens: int, deadline_seconds: float | None
    ) -> AsyncGenerator[Piece | Lost | Finished, None]:
        return self._worker.generate(
            prompt, max_tokens=max_tokens, stop=self._template.stop, deadline_seconds=deadline_seconds
        )


class LocalEmbedder:
    """An embedding worker; some models want a prefix that says what a text is."""

    def __init__(self, worker: Worker, identity: str, prefixes: Prefixes) -> None:
        self._worker = worker
        self._identity = identity
        self._prefixes = prefixes

    @property
    def identity(self) -> str:
        return self._identity

    async def embed_question(self, text: str) -> FloatArray:
        vectors = await self._worker.embed([self._prefixes.query + text])
        vector: FloatArray = vectors[0]
        return vector

    async def embed_documents(self, texts: Sequence[str]) -> FloatArray:
        return await self._worker.embed([self._prefixes.document + text for text in texts])
