"""The OpenAI-compatible routes: the models themselves, without documents."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from edged.errors import (
    EdgedError,
    ModelError,
    ModelNotFoundError,
    OutputFormatError,
    PromptTooLongError,
    RequestError,
    UnsupportedParameterError,
    WorkerLostError,
)
from edged.gateway import openai_wire
from edged.gateway.exchange import (
    EventStream,
    Write,
    error_headers,
    json_response,
    read_json,
    request_body,
    while_connected,
)
from edged.gateway.openai_wire import ChatRequest, CompletionRequest, EmbeddingsRequest, Style
from edged.serving.chat import LocalChat
from edged.serving.pool import ChatPool, EmbedderPool
from edged.types import Segment
from edged.workers.protocol import Finished, Piece
from edged.workers.worker import Lost

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models")

Generation = AsyncGenerator[Piece | Lost | Finished, None]
Start = Callable[[LocalChat, float | None], Generation]
"""Given the model, and what is left of the request's time in seconds."""


def speaks(path: str) -> bool:
    """Whether clients of this path expect errors in OpenAI's form."""
    return path in PATHS or path.startswith("/v1/models/")


def error_response(error: EdgedError) -> Response:
    status = openai_wire.status_of(error)
    return json_response(openai_wire.body_of(error), status, error_headers(status, error))


class OpenAiRoutes:
    """Chats and completions by the chat model, embeddings by the embedder, and their names."""

    def __init__(self, chats: ChatPool, embedders: EmbedderPool, max_body_bytes: int) -> None:
        self._chats = chats
        self._embedders = embedders
        self._max_body_bytes = max_body_bytes
        self._created = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        for path, route, model in (
            ("/v1/chat/completions", self.chat, ChatRequest),
            ("/v1/completions", self.complete, CompletionRequest),
            ("/v1/embeddings", self.embed, EmbeddingsRequest),
        ):
            extra = request_body(model)
            app.add_api_route(path, route, methods=["POST"], response_class=Response, openapi_extra=extra)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{id:path}", self.model)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        asked = openai_wire.parse(await read_json(request, self._max_body_bytes), ChatRequest)
        return await self._answer(request, Style("chat"), asked, lambda chat, left: _converse(chat, asked, left))

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        asked = openai_wire.parse(await read_json(request, self._max_body_bytes), CompletionRequest)
        return await self._answer(request, Style("text"), asked, lambda chat, left: _continue(chat, asked, left))

    async def embed(self, request: Request) -> Response:
        """Vectors of unit length, of the texts as they are."""
        asked = openai_wire.parse(await read_json(request, self._max_body_bytes), EmbeddingsRequest)
        body = await while_connected(request.receive, self._embed(asked))
        return Response(body, media_type="application/json")

    async def _embed(self, asked: EmbeddingsRequest) -> bytes:
        async with self._embedders.lease() as embedder:
            _check_name(asked.model, [embedder.identity])
            vectors, tokens = await embedder.embed_plain(asked.input)
        if asked.dimensions not in (None, vectors.shape[1]):
            raise UnsupportedParameterError(
                f"'dimensions' = {asked.dimensions} is not supported: this model has {vectors.shape[1]}",
                field="dimensions",
            )
        rows = []
        for row in vectors:
            rows.append(openai_wire.vector(row, asked.encoding_format))
            await asyncio.sleep(0)  # two thousand vectors must not hold up what streams to others
        return openai_wire.embeddings_body(embedder.identity, rows, tokens)

    async def models(self) -> dict[str, object]:
        """The models in service."""
        return {"object": "list", "data": [self._shown(identity) for identity in self._identities()]}

    async def model(self, id: str) -> dict[str, object]:
        """One of them, by id or identity."""
        for identity in self._identities():
            if _is_name_of(id, identity):
                return self._shown(identity)
        raise _no_such_model(id, self._identities())

    def _identities(self) -> list[str]:
        embedder = self._embedders.active
        return [*self._chats.names, *([embedder.identity] if embedder is not None else [])]

    def _shown(self, identity: str) -> dict[str, object]:
        return openai_wire.model_body(identity, self._created)

    async def _answer(
        self, request: Request, style: Style, asked: ChatRequest | CompletionRequest, start: Start
    ) -> Response:
        answer = ModelAnswer(self._chats, style, asked, start)
        if asked.stream:
            return AnswerStream(answer)
        return json_response(await while_connected(request.receive, answer.whole()))


def _check_name(asked: str, identities: Sequence[str]) -> None:
    """Refuse a model that is not served; where none is, the pool says so itself."""
    if identities and not any(_is_name_of(asked, identity) for identity in identities):
        raise _no_such_model(asked, identities)


def _is_name_of(asked: str, identity: str) -> bool:
    return asked in (identity, identity.partition("@")[0])


def _no_such_model(asked: str, identities: Sequence[str]) -> ModelNotFoundError:
    names = ", ".join(f"'{identity.partition('@')[0]}'" for identity in identities)
    return ModelNotFoundError(
        f"the model '{asked[:100]}' does not exist here", hint=f"this route serves {names or 'none'}", field="model"
    )


# --- what the model is asked -----------------------------------------------------------------------


def _converse(chat: LocalChat, asked: ChatRequest, deadline_seconds: float | None) -> Generation:
    messages = asked.conversation
    try:
        prompt = chat.render(messages)
        prefix = chat.prefix_segments(messages) if messages[0][0] == "system" else 0
    except ModelError as error:
        raise RequestError(error.message, hint=error.hint, field="messages") from error
    return chat.generate(
        prompt,
        max_tokens=asked.longest or chat.fair_tokens,
        sampling=asked.sampling,
        output=asked.output,
        stop=asked.stop,
        priority=asked.priority,
        prefix_segments=prefix,
        keep=True,
        deadline_seconds=deadline_seconds,
    )


def _continue(chat: LocalChat, asked: CompletionRequest, deadline_seconds: float | None) -> Generation:
    """Past the template: the caller's text is the whole prompt, and what is special in it is the caller's own."""
    return chat.generate(
        [Segment(asked.prompt, special=True)],
        max_tokens=asked.max_tokens,
        sampling=asked.sampling,
        output=asked.output,
        stop=asked.stop,
        priority=asked.priority,
        deadline_seconds=deadline_seconds,
        templated=False,
    )


# --- how it is answered ----------------------------------------------------------------------------


class ModelAnswer:
    """One answer under way: whole, or piece by piece."""

    def __init__(self, chats: ChatPool, style: Style, asked: ChatRequest | CompletionRequest, start: Start) -> None:
        self._chats = chats
        self._style = style
        self._asked = asked
        self._start = start
        self._id = style.id_prefix + uuid.uuid4().hex
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        """The response body. A worker that dies on the way starts the answer anew."""
        texts: list[str] = []
        async with self._under_way() as (chat, items):
            async for item in items:
                match item:
                    case Piece(text=text):
                        texts.append(text)
                    case Lost():
                        texts.clear()
                    case Finished():
                        return self._style.body(self._id, self._created, chat.name, "".join(texts), item)
        raise RuntimeError("the generation ended without its last item")

    async def stream(self, write: Write) -> None:
        """Write the chunks. What is written cannot be taken back: :class:`WorkerLostError` when it would have to be."""
        include_usage = self._asked.include_usage
        async with self._under_way() as (chat, items):
            chunks = self._style.chunks(self._id, self._created, chat.name, include_usage=include_usage)
            unsent = chunks.first()
            spoken = False
            async for item in items:
                match item:
                    case Piece(text=text):
                        spoken = True
                        await write(unsent + chunks.text(text))
                        unsent = b""
                    case Lost() if spoken:
                        raise WorkerLostError("the worker failed in the middle of this answer", hint="ask again")
                    case Finished():
                        await write(unsent + chunks.last(item))

    @asynccontextmanager
    async def _under_way(self) -> AsyncGenerator[tuple[LocalChat, Generation], None]:
        """The model and what it says; an error that is the fault of a parameter names it."""
        began, deadline = time.monotonic(), self._asked.deadline_seconds
        try:
            _check_name(self._asked.model, self._chats.names)
            async with self._chats.lease(deadline) as chat:
                left = None if deadline is None else max(0.0, deadline - (time.monotonic() - began))
                async with aclosing(self._start(chat, left)) as items:
                    yield chat, items
        except PromptTooLongError as error:
            error.facts["field"] = "messages" if isinstance(self._asked, ChatRequest) else "prompt"
            raise
        except OutputFormatError as error:
            error.facts["field"] = "response_format" if self._asked.grammar is None else "grammar"
            raise


class AnswerStream(EventStream):
    """An answer as chunks, the last one ``[DONE]``, or an error where it cannot go on."""

    def __init__(self, answer: ModelAnswer) -> None:
        super().__init__()
        self._answer = answer

    async def produce(self, write: Write) -> None:
        await self._answer.stream(write)

    def last_words(self, error: EdgedError) -> bytes:
        return openai_wire.error_event(error)
