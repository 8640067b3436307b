"""The HTTP door: routes, problem documents, access rules, and uvicorn run as a part of our own loop."""

import asyncio
import contextlib
import hmac
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Protocol, cast
from urllib.parse import quote, urlencode

import structlog
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edged import __version__, credentials
from edged.config import is_loopback
from edged.errors import (
    ConfigError,
    EdgedError,
    ExpiredError,
    UnauthorizedError,
)
from edged.gateway import openai, openai_wire, wire
from edged.gateway.exchange import (
    EVENT_STREAM_TYPE,
    EventStream,
    Write,
    error_headers,
    json_response,
    known,
    problem,
    problem_head,
    read_json,
    request_body,
    server_sent_event,
    while_connected,
)
from edged.gateway.inspection import InspectionRoutes
from edged.gateway.profile import ProfileRoutes
from edged.gateway.rollouts import RolloutRoutes
from edged.probe.profiles import Profiles
from edged.serving.inspection import Inspections
from edged.serving.pool import ChatPool, EmbedderPool
from edged.serving.rollout import Rollouts
from edged.types import Answer, AnswerEvent, Delta, DocumentInfo, Ingested, Question, Restarted

PROBLEM_TYPE = "application/problem+json"
OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
CLIENT_GONE_STATUS = 499  # nobody reads it; it marks the line in our own log
HINTS = {
    403: "set an API key (http.api_key_file) to serve other machines",
    404: "docs/HTTP.md and /openapi.json list the routes",
    405: "the Allow header lists the methods of this route",
    415: "send JSON with the header 'Content-Type: application/json'",
    421: "use http://127.0.0.1 or http://localhost, or set an API key (http.api_key_file)",
}

log = structlog.get_logger("http")


class Answers(Protocol):
    """Whoever answers questions."""

    def stream(self, question: Question) -> AsyncIterator[AnswerEvent]:
        """Events that end with exactly one :class:`Answer`; closing the iterator cancels the work."""
        ...


class Documents(Protocol):
    """Whoever keeps the documents."""

    async def add(
        self,
        *,
        collection: str,
        document_id: str | None,
        title: str | None,
        format: str,
        text: str,
    ) -> Ingested: ...

    async def remove(self, collection: str, document_id: str) -> None: ...

    async def list(self, collection: str | None) -> list[DocumentInfo]: ...

    async def get(self, collection: str, document_id: str) -> DocumentInfo: ...


class Status(Protocol):
    """Whoever knows how the daemon is."""

    def snapshot(self) -> wire.StatusBody: ...


class OneCollection(BaseModel):
    """Query parameters of the routes of one document."""

    model_config = ConfigDict(extra="forbid")
    collection: wire.Name = "default"


class AnyCollection(BaseModel):
    """Query parameters of the list of documents."""

    model_config = ConfigDict(extra="forbid")
    collection: wire.Name | None = None


def create_app(
    *,
    answers: Answers,
    documents: Documents,
    status: Status,
    metrics: Callable[[], bytes],
    chats: ChatPool,
    embedders: EmbedderPool,
    rollouts: Rollouts,
    profiles: Profiles,
    inspections: Inspections,
    api_key: str | None,
    max_body_bytes: int,
) -> FastAPI:
    """The ASGI application; the OpenAI routes speak to ``chats`` and ``embedders`` directly.

    Without ``api_key`` only loopback peers that name a loopback host are served.
    """
    app = FastAPI(
        title="edged",
        version=__version__,
        docs_url=None,  # the pages would load their scripts from the network
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(RequestLog), Middleware(Guard, api_key=api_key)],
        exception_handlers={
            EdgedError: _on_edged_error,
            RequestValidationError: _on_validation_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_client_gone,
        },
    )
    HealthRoutes(status, metrics).add_to(app)
    QueryRoutes(answers, max_body_bytes).add_to(app)
    DocumentRoutes(documents, max_body_bytes).add_to(app)
    openai.OpenAiRoutes(chats, embedders, max_body_bytes).add_to(app)
    RolloutRoutes(rollouts, max_body_bytes).add_to(app)
    ProfileRoutes(profiles).add_to(app)
    InspectionRoutes(inspections, profiles, max_body_bytes).add_to(app)
    return app


# --- routes ----------------------------------------------------------------------------------------


class HealthRoutes:
    """How the daemon is: for people, for supervisors, for Prometheus."""

    def __init__(self, status: Status, metrics: Callable[[], bytes]) -> None:
        self._status = status
        self._metrics = metrics

    def add_to(self, app: FastAPI) -> None:
        unwell: dict[int | str, dict[str, Any]] = {503: {"model": wire.StatusBody}}
        shown: dict[str, Any] = {"response_model": wire.StatusBody, "responses": unwell}
        app.add_api_route("/health", self.health, **shown)
        app.add_api_route("/health/live", self.live)
        app.add_api_route("/health/ready", self.ready, **shown)
        app.add_api_route("/metrics", self.metrics, response_class=Response)

    async def health(self) -> Response:
        """Everything about the daemon's state; 503 while a condition is failing."""
        body = self._status.snapshot()
        return _status_response(body, ok=not body.failing)

    async def live(self) -> dict[str, str]:
        """200 as long as the event loop turns."""
        return {"status": "live"}

    async def ready(self) -> Response:
        """The state, with 503 until questions are taken."""
        body = self._status.snapshot()
        return _status_response(body, ok=body.ready)

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._metrics(), headers={"content-type": CONTENT_TYPE_LATEST})


class QueryRoutes:
    """Questions and their answers."""

    def __init__(self, answers: Answers, max_body_bytes: int) -> None:
        self._answers = answers
        self._max_body_bytes = max_body_bytes

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(
            "/v1/query",
            self.query,
            methods=["POST"],
            response_model=wire.AnswerBody,
            openapi_extra=request_body(wire.HttpQueryRequest),
        )

    async def query(self, request: Request) -> Response:
        """Answer a question from the documents; as server-sent events when asked to."""
        body = wire.parse_json(await read_json(request, self._max_body_bytes), wire.HttpQueryRequest)
        identifier = body.id or uuid.uuid4().hex
        if body.stream or EVENT_STREAM_TYPE in request.headers.get("accept", ""):
            return QueryStream(identifier, self._answers, body)
        answer = await while_connected(request.receive, self._answer(body))
        return json_response(wire.answer_body(identifier, answer))

    async def _answer(self, body: wire.HttpQueryRequest) -> Answer:
        async with _worth_answering(body.expires_s), _events(self._answers, body) as events:
            async for event in events:
                if isinstance(event, Answer):
                    return event
        raise RuntimeError("the stream ended without an answer")


class DocumentRoutes:
    """The documents that answers stand on."""

    def __init__(self, documents: Documents, max_body_bytes: int) -> None:
        self._documents = documents
        self._max_body_bytes = max_body_bytes

    def add_to(self, app: FastAPI) -> None:
        one = "/v1/documents/{id:path}"
        app.add_api_route(
            "/v1/documents",
            self.add,
            methods=["POST"],
            status_code=201,
            response_model=wire.IngestedBody,
            responses={200: {"model": wire.IngestedBody, "description": "Unchanged"}},
            openapi_extra=request_body(wire.DocumentRequest),
        )
        app.add_api_route("/v1/documents", self.list, response_model=wire.DocumentsBody)
        app.add_api_route(one, self.get, response_model=wire.DocumentBody)
        app.add_api_route(one, self.remove, methods=["DELETE"], status_code=204, response_class=Response)

    async def add(self, request: Request) -> Response:
        """Add a document, or replace the one of the same id; the same text again costs nothing."""
        body = wire.parse_json(await read_json(request, self._max_body_bytes), wire.DocumentRequest)
        ingested = await self._documents.add(
            collection=body.collection, document_id=body.id, title=body.title, format=body.format, text=body.text
        )
        document = ingested.document
        place = f"/v1/documents/{quote(document.id)}?{urlencode({'collection': document.collection})}"
        return json_response(
            wire.ingested_body(ingested).model_dump(mode="json"),
            status=200 if ingested.outcome == "unchanged" else 201,
            headers={"location": place},
        )

    async def list(self, parameters: Annotated[AnyCollection, Query()]) -> wire.DocumentsBody:
        """All documents, or those of one collection."""
        found = await self._documents.list(parameters.collection)
        return wire.DocumentsBody(documents=[wire.document_body(document) for document in found])

    async def get(self, id: str, parameters: Annotated[OneCollection, Query()]) -> wire.DocumentBody:
        """One document, without its text."""
        return wire.document_body(await self._documents.get(parameters.collection, id))

    async def remove(self, id: str, parameters: Annotated[OneCollection, Query()]) -> Response:
        """Remove a document with everything derived from it."""
        await self._documents.remove(parameters.collection, id)
        return Response(status_code=204)


def _status_response(body: wire.StatusBody, *, ok: bool) -> Response:
    return json_response(body.model_dump(mode="json"), 200 if ok else 503, {"cache-control": "no-store"})


# --- answering, while the client listens -----------------------------------------------------------


@contextlib.asynccontextmanager
async def _events(answers: Answers, body: wire.QueryRequest) -> AsyncGenerator[AsyncIterator[AnswerEvent]]:
    """The events of one answer; leaving closes them, which cancels what is not finished."""
    events = answers.stream(body.question())
    async with contextlib.aclosing(cast(AsyncGenerator[AnswerEvent], events)):
        yield events


@contextlib.asynccontextmanager
async def _worth_answering(seconds: float | None) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ExpiredError(
            f"no answer within expires_s = {seconds}", hint="give it longer, or ask with a deadline_ms"
        ) from error


class QueryStream(EventStream):
    """An answer as server-sent events: ``delta`` and ``restarted``, then ``answer`` or ``error``."""

    def __init__(self, identifier: str, answers: Answers, body: wire.HttpQueryRequest) -> None:
        super().__init__()
        self._identifier = identifier
        self._answers = answers
        self._body = body

    async def produce(self, write: Write) -> None:
        async with _worth_answering(self._body.expires_s), _events(self._answers, self._body) as events:
            async for event in events:
                await write(self._render(event))

    def last_words(self, error: EdgedError) -> bytes:
        return server_sent_event("error", problem(error)[1])

    def _render(self, event: AnswerEvent) -> bytes:
        match event:
            case Delta(text=text):
                return server_sent_event("delta", {"text": text})
            case Restarted(reason=reason):
                return server_sent_event("restarted", {"reason": reason})
            case Answer():
                return server_sent_event("answer", wire.answer_body(self._identifier, event))


# --- errors ----------------------------------------------------------------------------------------


def _refusal(path: str, error: EdgedError) -> Response:
    """An error in the form that the clients of this path understand."""
    if openai.speaks(path):
        return openai.error_response(error)
    status, body = problem(error)
    headers = error_headers(status, error)
    return Response(wire.encode(body), status_code=status, headers=headers, media_type=PROBLEM_TYPE)


def _http_refusal(path: str, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """A refusal by HTTP itself, which has no :class:`EdgedError`."""
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    hint = HINTS.get(status, "")
    if openai.speaks(path):
        body, media_type = openai_wire.error_body(status, code, detail, hint), "application/json"
    else:
        body = {**problem_head(code, status), "detail": detail, "code": code, "hint": hint, "retryable": False}
        media_type = PROBLEM_TYPE
    extra = {**(headers or {}), **error_headers(status)}
    return Response(wire.encode(body), status_code=status, headers=extra, media_type=media_type)


async def _on_edged_error(request: Request, error: Exception) -> Response:
    return _refusal(request.url.path, known(error))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    inner = [{**first, "loc": first["loc"][1:]} for first in error.errors()]  # less FastAPI's "query"
    return _refusal(request.url.path, wire.explain(inner, ["collection"]))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if detail == HTTPStatus(error.status_code).phrase:
        detail = f"{request.method} {request.url.path}: {detail.lower()}"
    return _http_refusal(request.url.path, error.status_code, detail, error.headers)


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)


# --- around every request --------------------------------------------------------------------------


class RequestLog:
    """One log line per request, and a 500 without internals for what nobody foresaw."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def watching_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, watching_send)
        except Exception as error:
            if status:
                raise  # the answer is under way: only breaking the connection tells the client
            await _refusal(scope["path"], known(error))(scope, receive, watching_send)
        finally:
            _log_request(scope, status, time.perf_counter() - began)


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    write = log.debug if scope["path"].startswith(("/health", "/metrics")) else log.info
    write(
        "http_request",
        method=scope["method"],
        path=scope["path"],
        status=status or CLIENT_GONE_STATUS,
        duration_ms=round(seconds * 1000, 1),
    )


class Guard:
    """Who may come in: holders of the API key, or without one only this machine under its own names."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refuse(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refuse(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._api_key is None:
            return _refuse_strangers(scope, headers)
        if scope["path"] in OPEN_PATHS or _carries(headers, self._api_key):
            return None
        error = UnauthorizedError(
            "this needs the API key", hint="send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
        )
        return _refusal(scope["path"], error)


def _carries(headers: Headers, api_key: bytes) -> bool:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    given = credentials.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return hmac.compare_digest(given.encode("latin-1"), api_key)


def _refuse_strangers(scope: Scope, headers: Headers) -> Response | None:
    """Other machines, and web pages of other sites that made their name resolve to this machine."""
    peer = scope.get("client")
    if peer is None or not is_loopback(peer[0]):
        return _http_refusal(scope["path"], 403, "without an API key only this machine itself is served")
    host = headers.get("host", "")
    if not is_loopback(_without_port(host)):
        return _http_refusal(scope["path"], 421, f"without an API key the Host '{host[:100]}' is not served")
    return None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


# --- the server ------------------------------------------------------------------------------------


class _Uvicorn(uvicorn.Server):
    """uvicorn as a guest: our signals stay ours, and it wakes once a second instead of ten times."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()
        self._leaving = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    async def main_loop(self) -> None:
        while not self.should_exit:
            await self.on_tick(0)  # renews the Date header
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), timeout=1.0)

    def leave(self, grace_seconds: float) -> None:
        self.config.timeout_graceful_shutdown = cast(int, grace_seconds)  # handed to asyncio, which takes floats
        self.should_exit = True
        self._leaving.set()


class HttpServer:
    """Serves an application on one address inside the running loop, with TLS when given a certificate.

    ``port`` 0 takes a free one. ``start`` raises :class:`ConfigError` when the address cannot be had or the
    certificate cannot be read; once it returns, requests are accepted. ``listener`` is a socket that somebody opened
    for us, which must be at that very address.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        host: str,
        port: int,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self._app = app
        self._listener = listener
        self._host = host
        self._port = port
        self._tls_cert = tls_cert
        self._tls_key = tls_key
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port served; the asked-for one before ``start``."""
        return self._port

    async def start(self) -> None:
        config = self._uvicorn_config()
        if self._listener is None:
            listener = bind(self._host, self._port)
        else:
            listener = _adopted(self._listener, self._host, self._port)
        self._port = listener.getsockname()[1]
        self._server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-server")
        accepting = asyncio.create_task(self._server.accepting.wait(), name="http-server-accepting")
        await asyncio.wait({self._serving, accepting}, return_when=asyncio.FIRST_COMPLETED)
        accepting.cancel()
        if self._serving.done():
            self._serving.result()
        log.info("http_listening", host=self._host, port=self._port, tls=self._tls_cert is not None)

    async def wait(self) -> None:
        """Return when the server has ended, or raise what ended it."""
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def stop(self, grace_seconds: float) -> None:
        """Take no more connections, give requests under way ``grace_seconds``, then cancel them. Repeatable."""
        if self._server is None or self._serving is None:
            return
        self._server.leave(grace_seconds)
        await asyncio.shield(self._serving)
        await self._end_rest(self._server)
        log.info("http_stopped")

    async def _end_rest(self, server: _Uvicorn) -> None:
        """uvicorn cancels the requests that outlast the grace, but neither awaits nor disconnects them."""
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
        for connection in list(server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()

    def _uvicorn_config(self) -> uvicorn.Config:
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # they could make any peer look like loopback
            ssl_certfile=self._tls_cert,
            ssl_keyfile=self._tls_key,
        )
        credentials.server_context(self._tls_cert, self._tls_key)  # its errors say what uvicorn's do not
        config.load()
        return config


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; :class:`ConfigError` says why the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    listener.setblocking(False)
    return listener


def _adopted(listener: socket.socket, host: str, port: int) -> socket.socket:
    """A socket opened by the service manager. Who may ask depends on http.listen, so the two must say the same."""
    found = listener.getsockname() if listener.family in (socket.AF_INET, socket.AF_INET6) else ("a Unix socket", 0)
    try:
        family, _, _, _, wanted = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    if (listener.family, found[:2]) != (family, wanted[:2]):
        raise ConfigError(
            f"edged was handed a socket at {found[0]}:{found[1]}, but http.listen is {host}:{port}",
            hint="give edged.socket and http.listen the same address, or disable edged.socket",
        )
    listener.setblocking(False)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host}:{port}: {error.strerror}",
        hint="stop the program that uses the port, or choose another with --host or http.listen",
        host=host,
        port=port,
    )
