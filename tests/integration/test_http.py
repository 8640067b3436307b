"""The HTTP door on a real socket: routes, problems, streaming, cancelling, access rules, start and stop."""

import asyncio
import json
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from edged.client import Client
from edged.errors import ConfigError, DaemonUnreachableError, DocumentNotFoundError, EdgedError, QueueFullError
from edged.gateway import wire
from edged.gateway.http import HttpServer, create_app
from edged.serving.pool import ChatPool, EmbedderPool
from edged.types import (
    Answer,
    AnswerEvent,
    Citation,
    Delta,
    DocumentInfo,
    Ingested,
    Question,
    Restarted,
    Timings,
)

KEY = "s3cret-käse"
NOBODY: Any = None
LIMIT = 2048
LINE_SEPARATOR = "\u2028"


class ScriptedAnswers:
    """Plays a script; ``None`` in it waits for ever. Remembers the questions and whether it was closed."""

    def __init__(self) -> None:
        self.script: list[AnswerEvent | Exception | None] = [Delta("Hot"), Delta(" pump"), answer("Hot pump")]
        self.questions: list[Question] = []
        self.waiting = asyncio.Event()
        self.closed = asyncio.Event()

    async def stream(self, question: Question) -> AsyncIterator[AnswerEvent]:
        self.questions.append(question)
        try:
            for step in self.script:
                if step is None:
                    self.waiting.set()
                    await asyncio.Event().wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.closed.set()


class DocumentsInMemory:
    """Keeps documents in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], DocumentInfo] = {}

    async def add(
        self, *, collection: str, document_id: str | None, title: str | None, format: str, text: str
    ) -> Ingested:
        identifier = document_id or "made-up"
        old = self.kept.get((collection, identifier))
        info = DocumentInfo(
            id=identifier,
            collection=collection,
            title=title or identifier,
            format=format,
            sha256=text,
            bytes=len(text.encode()),
            chunks=1,
            added_at=1.0,
        )
        self.kept[collection, identifier] = info
        if old is None:
            return Ingested(document=info, outcome="added")
        return Ingested(document=info, outcome="unchanged" if old.sha256 == text else "replaced")

    async def remove(self, collection: str, document_id: str) -> None:
        await self.get(collection, document_id)
        del self.kept[collection, document_id]

    async def list(self, collection: str | None) -> list[DocumentInfo]:
        return [info for info in self.kept.values() if collection in (None, info.collection)]

    async def get(self, collection: str, document_id: str) -> DocumentInfo:
        try:
            return self.kept[collection, document_id]
        except KeyError:
            raise DocumentNotFoundError(f"no document '{document_id}'", document=document_id) from None


class GivenStatus:
    """Shows the status it was given."""

    def __init__(self) -> None:
        self.status = "ok"
        self.vector_store_ready = True

    def snapshot(self) -> wire.StatusBody:
        return wire.StatusBody(
            status=self.status,
            version="0",
            uptime=1.5,
            model_loaded=True,
            vector_store_ready=self.vector_store_ready,
            conditions=[],
            chat=wire.WorkerBody(model="tiny", state="ready"),
            embed=wire.WorkerBody(model="mini", state="ready"),
            documents=1,
            chunks=2,
            events=wire.EventsBody(),
            mqtt=wire.MqttBody(connected=False),
        )


class Door:
    """A served application with its doubles."""

    def __init__(self) -> None:
        self.answers = ScriptedAnswers()
        self.documents = DocumentsInMemory()
        self.status = GivenStatus()
        self.server: HttpServer
        self.client: httpx.AsyncClient

    @asynccontextmanager
    async def open(self, api_key: str | None = None) -> AsyncIterator["Door"]:
        app = create_app(
            answers=self.answers,
            documents=self.documents,
            status=self.status,
            metrics=lambda: b"up 1\n",
            chats=ChatPool(None),
            embedders=EmbedderPool(None),
            rollouts=NOBODY,
            profiles=NOBODY,
            inspections=NOBODY,
            api_key=api_key,
            max_body_bytes=LIMIT,
        )
        self.server = HttpServer(app, host="127.0.0.1", port=0)
        await self.server.start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.server.port}", trust_env=False) as client:
            self.client = client
            yield self
        await self.server.stop(1.0)


def answer(text: str) -> Answer:
    cited = Citation(
        sentence_id="1.0", chunk_id=1, document_id="d", title="D", headings=(), text="It is hot.", start=0, end=10
    )
    return Answer(text=text, citations=(cited,), step="generated", note="", model="tiny", timings=Timings())


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with Door().open() as opened:
        yield opened


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a response, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "code", "hint", "retryable"} <= body.keys()
    assert (body["status"], body["code"]) == (status, code)
    return body


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a body."""
    parts = [part.split("\n") for part in text.split("\n\n") if part]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


# --- health and metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "stores", "health", "ready"),
    [("ok", True, 200, 200), ("degraded", True, 200, 200), ("failing", True, 503, 503), ("degraded", False, 200, 200)],
)
async def test_health_and_readiness_tell_the_state(
    door: Door, status: str, stores: bool, health: int, ready: int
) -> None:
    door.status.status, door.status.vector_store_ready = status, stores
    shown = await door.client.get("/health")
    assert (shown.status_code, shown.json()["status"]) == (health, status)
    readiness = await door.client.get("/health/ready")
    assert (readiness.status_code, readiness.json()) == (ready, shown.json())
    assert (await door.client.get("/health/live")).status_code == 200


async def test_metrics_are_served_as_prometheus_text(door: Door) -> None:
    response = await door.client.get("/metrics")
    assert response.content == b"up 1\n"
    assert response.headers["content-type"].startswith("text/plain; version=")


# --- questions -------------------------------------------------------------------------------------


async def test_a_question_is_answered_as_json_under_its_id(door: Door) -> None:
    response = await door.client.post("/v1/query", json={"query": "Why?", "id": "e-1", "deadline_ms": 500})
    assert response.status_code == 200
    assert (response.json()["id"], response.json()["answer"]) == ("e-1", "Hot pump")
    assert door.answers.questions == [Question(text="Why?", deadline_seconds=0.5)]


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_question_is_answered_as_events_when_asked_to(door: Door, by_header: bool) -> None:
    door.answers.script.insert(1, Restarted("worker lost"))
    door.answers.script.insert(2, Delta(LINE_SEPARATOR))
    headers = {"accept": "text/event-stream"} if by_header else {}
    body = {"query": "Why?"} if by_header else {"query": "Why?", "stream": True}
    response = await door.client.post("/v1/query", json=body, headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert LINE_SEPARATOR not in response.text
    shown = events_of(response.text)
    assert [name for name, _ in shown] == ["delta", "restarted", "delta", "delta", "answer"]
    assert shown[2][1] == {"text": LINE_SEPARATOR}
    assert shown[-1][1]["answer"] == "Hot pump"


async def test_an_error_before_the_first_event_is_a_plain_problem(door: Door) -> None:
    door.answers.script = [QueueFullError("full", waiting=3)]
    response = await door.client.post("/v1/query", json={"query": "Why?", "stream": True})
    body = problem(response, 503, "queue_full")
    assert (body["retryable"], body["facts"]) == (True, {"waiting": 3})
    assert response.headers["retry-after"] == "1"


async def test_an_error_that_knows_when_it_is_over_says_so_in_whole_seconds(door: Door) -> None:
    door.answers.script = [QueueFullError("full", retry_after_seconds=2.1)]
    response = await door.client.post("/v1/query", json={"query": "Why?"})
    assert problem(response, 503, "queue_full")["facts"] == {"retry_after_seconds": 2.1}
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize(("error", "code"), [(QueueFullError("full"), "queue_full"), (OSError("/secret"), "internal")])
async def test_an_error_after_the_first_event_ends_the_stream_as_an_event(
    door: Door, error: Exception, code: str
) -> None:
    door.answers.script = [Delta("Hot"), error]
    with capture_logs():
        response = await door.client.post("/v1/query", json={"query": "Why?", "stream": True})
    name, data = events_of(response.text)[-1]
    assert (name, data["code"]) == ("error", code)
    assert "/secret" not in response.text


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_later_than_expires_s_is_given_up(door: Door, stream: bool) -> None:
    door.answers.script = [None]
    response = await door.client.post("/v1/query", json={"query": "Why?", "expires_s": 0.05, "stream": stream})
    problem(response, 410, "expired")
    assert door.answers.closed.is_set()


@pytest.mark.parametrize(("stream", "first"), [(b"true", [Delta("Hot")]), (b"true", []), (b"false", [])])
async def test_a_client_that_goes_away_cancels_the_work(door: Door, stream: bytes, first: list[AnswerEvent]) -> None:
    door.answers.script = [*first, None]
    body = b'{"query":"Why?","stream":' + stream + b"}"
    _, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
    head = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    await door.answers.waiting.wait()
    assert not door.answers.closed.is_set()
    writer.close()
    await asyncio.wait_for(door.answers.closed.wait(), timeout=10)


async def test_two_questions_are_answered_at_the_same_time(door: Door) -> None:
    door.answers.script = [None]
    first = asyncio.create_task(door.client.post("/v1/query", json={"query": "Why?"}))
    await door.answers.waiting.wait()
    door.answers.script = [answer("quick")]
    second = await door.client.post("/v1/query", json={"query": "Why?"})
    assert second.json()["answer"] == "quick"
    first.cancel()


# --- documents -------------------------------------------------------------------------------------


async def test_documents_are_added_listed_shown_and_removed(door: Door) -> None:
    body = {"id": "man/pump.md", "text": "Hot.", "format": "markdown", "collection": "pumps"}
    added = await door.client.post("/v1/documents", json=body)
    assert (added.status_code, added.json()["outcome"]) == (201, "added")
    assert added.headers["location"] == "/v1/documents/man/pump.md?collection=pumps"
    unchanged = await door.client.post("/v1/documents", json=body)
    assert (unchanged.status_code, unchanged.json()["outcome"]) == (200, "unchanged")
    replaced = await door.client.post("/v1/documents", json={**body, "text": "Cold."})
    assert (replaced.status_code, replaced.json()["outcome"]) == (201, "replaced")
    shown = await door.client.get(added.headers["location"])
    assert shown.json()["format"] == "markdown"
    assert (await door.client.get("/v1/documents")).json() == {"documents": [shown.json()]}
    assert (await door.client.get("/v1/documents?collection=other")).json() == {"documents": []}
    problem(await door.client.delete("/v1/documents/man/pump.md"), 404, "document_not_found")
    assert (await door.client.delete(added.headers["location"])).status_code == 204
    problem(await door.client.get(added.headers["location"]), 404, "document_not_found")


# --- the client of the command line, against the real door -----------------------------------------


async def test_the_client_asks_adds_lists_and_removes() -> None:
    def use(port: int) -> list[object]:
        with Client(f"http://127.0.0.1:{port}", api_key=KEY.replace("ä", "ae")) as client:
            asked = list(client.ask(wire.QueryRequest(query="Why?", id="e-1")))
            client.add_document(wire.DocumentRequest(id="a b/ü.md", text="Hot.", collection="pumps"))
            listed = client.documents("pumps")
            client.remove_document("pumps", "a b/ü.md")
            return [asked, listed, client.documents(), client.status().ready]

    async with Door().open(api_key=KEY.replace("ä", "ae")) as door:
        asked, listed, left, ready = await asyncio.to_thread(use, door.server.port)
    assert isinstance(asked, list)
    assert isinstance(listed, list)
    assert asked[:2] == [Delta("Hot"), Delta(" pump")]
    assert (asked[2].id, asked[2].answer) == ("e-1", "Hot pump")
    assert [document.id for document in listed] == ["a b/ü.md"]
    assert (left, ready) == ([], True)


def test_the_client_does_not_wait_for_ever_where_nobody_answers_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.client.HEALTH_SECONDS", 0.05)
    with (
        socket.create_server(("127.0.0.1", 0)) as held,  # as systemd holds it for a daemon that does not start
        Client(f"http://127.0.0.1:{held.getsockname()[1]}") as asking,
        pytest.raises(DaemonUnreachableError, match="timed out"),
    ):
        asking.status()


@pytest.mark.parametrize("before", [[], [Delta("Hot")]])
async def test_the_client_raises_the_servers_own_error(door: Door, before: list[AnswerEvent]) -> None:
    door.answers.script = [*before, QueueFullError("full", hint="later", waiting=3)]

    def use() -> None:
        with Client(f"http://127.0.0.1:{door.server.port}") as client:
            list(client.ask(wire.QueryRequest(query="Why?")))

    with pytest.raises(QueueFullError, match="full") as caught:
        await asyncio.to_thread(use)
    assert (caught.value.hint, caught.value.facts) == ("later", {"waiting": 3})


async def test_leaving_the_clients_stream_cancels_the_work(door: Door) -> None:
    door.answers.script = [Delta("Hot"), None]

    def use() -> None:
        with Client(f"http://127.0.0.1:{door.server.port}") as client:
            events = client.ask(wire.QueryRequest(query="Why?"))
            next(events)
            events.close()

    await asyncio.to_thread(use)
    await asyncio.wait_for(door.answers.closed.wait(), timeout=10)


# --- problems --------------------------------------------------------------------------------------


async def test_mistakes_are_problem_documents(door: Door) -> None:
    client = door.client
    problem(await client.get("/nowhere"), 404, "not_found")
    problem(await client.get("/docs"), 404, "not_found")
    method = await client.put("/v1/query")
    problem(method, 405, "method_not_allowed")
    assert method.headers["allow"] == "POST"
    bad = problem(await client.post("/v1/query", json={"query": "a", "deadlin_ms": 1}), 422, "request_invalid")
    assert bad["hint"] == "did you mean 'deadline_ms'?"
    query = problem(await client.get("/v1/documents?colection=a"), 422, "request_invalid")
    assert query["hint"] == "did you mean 'collection'?"
    problem(await client.post("/v1/query", content=b"{"), 415, "unsupported_media_type")


async def test_an_unforeseen_error_is_logged_and_tells_nothing_of_our_insides(door: Door) -> None:
    unforeseen = OSError("/secret/path")
    door.answers.script = [unforeseen]
    with capture_logs() as lines:
        response = await door.client.post("/v1/query", json={"query": "Why?"})
    problem(response, 500, "internal")
    assert [line["exc_info"] for line in lines if line["event"] == "http_unforeseen_error"] == [unforeseen]
    assert "secret" not in response.text


async def test_a_body_over_the_limit_is_refused_by_its_declared_length(door: Door) -> None:
    response = await door.client.post("/v1/documents", json={"text": "a" * LIMIT})
    problem(response, 413, "payload_too_large")


async def test_a_chunked_body_over_the_limit_is_refused_while_it_is_read(door: Door) -> None:
    """The body never ends, so an answer proves that no one waited for its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.server.port)
    writer.write(
        b"POST /v1/documents HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"a" * 1024 + b"\r\n" + b"800\r\n" + b"a" * 2048 + b"\r\n"
    )
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=10)
    assert head.startswith(b"HTTP/1.1 413 ")
    writer.close()


# --- who may come in -------------------------------------------------------------------------------


async def test_with_a_key_only_its_holders_come_in() -> None:
    async with Door().open(api_key=KEY) as door:
        problem(await door.client.get("/health"), 401, "unauthorized")
        problem(await door.client.get("/openapi.json"), 401, "unauthorized")
        for wrong in ("", "Bearer", "Bearer wrong", f"Basic {KEY}"):
            given = await door.client.get("/health", headers=[(b"authorization", wrong.encode())])
            problem(given, 401, "unauthorized")
            assert given.headers["www-authenticate"].startswith("Bearer")
        for header in ((b"authorization", b"bearer " + KEY.encode()), (b"x-api-key", KEY.encode())):
            assert (await door.client.get("/health", headers=[header])).status_code == 200
        assert (await door.client.get("/health/live")).status_code == 200
        assert (await door.client.get("/health/ready", headers={"host": "device.lan"})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", "", "10.0.0.1"])
async def test_without_a_key_a_foreign_host_name_is_refused(door: Door, host: str) -> None:
    problem(await door.client.get("/health/live", headers={"host": host}), 421, "misdirected_request")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:3000", "127.0.0.1:1", "127.1.2.3", "[::1]:3000"])
async def test_without_a_key_this_machines_own_names_are_served(door: Door, host: str) -> None:
    assert (await door.client.get("/health", headers={"host": host})).status_code == 200


async def test_no_other_origin_is_invited(door: Door) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    response = await door.client.options("/v1/query", headers=headers)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


# --- the server ------------------------------------------------------------------------------------


async def test_a_taken_port_is_a_configuration_error(door: Door) -> None:
    second = HttpServer(
        create_app(
            answers=door.answers,
            documents=door.documents,
            status=door.status,
            metrics=bytes,
            chats=ChatPool(None),
            embedders=EmbedderPool(None),
            rollouts=NOBODY,
            profiles=NOBODY,
            inspections=NOBODY,
            api_key=None,
            max_body_bytes=LIMIT,
        ),
        host="127.0.0.1",
        port=door.server.port,
    )
    with pytest.raises(ConfigError, match="cannot listen on"):
        await second.start()


async def test_signals_stay_ours() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with Door().open():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_stopping_lets_an_answer_finish_within_the_grace() -> None:
    release = asyncio.Event()

    class Slow(ScriptedAnswers):
        async def stream(self, question: Question) -> AsyncIterator[AnswerEvent]:
            self.waiting.set()
            await release.wait()
            yield answer("late")

    opened = Door()
    opened.answers = Slow()
    async with opened.open() as door:
        asked = asyncio.create_task(door.client.post("/v1/query", json={"query": "Why?"}))
        await door.answers.waiting.wait()
        stopping = asyncio.create_task(door.server.stop(30))
        asyncio.get_running_loop().call_soon(release.set)
        assert (await asked).json()["answer"] == "late"
        await asyncio.wait_for(stopping, timeout=10)


@pytest.mark.parametrize("stream", [True, False])
async def test_stopping_cancels_what_outlasts_the_grace_and_can_be_repeated(stream: bool) -> None:
    async with Door().open() as door:
        door.answers.script = [Delta("Hot"), None]
        asked = asyncio.create_task(door.client.post("/v1/query", json={"query": "Why?", "stream": stream}))
        await door.answers.waiting.wait()
        await asyncio.wait_for(door.server.stop(0.05), timeout=10)
        assert door.answers.closed.is_set()
        await asyncio.gather(asked, return_exceptions=True)
        await door.server.stop(0.05)
        with pytest.raises(httpx.ConnectError):
            await door.client.get("/health")


async def test_stopping_does_not_wait_for_idle_connections() -> None:
    async with Door().open() as door:
        await door.client.get("/health")
        await asyncio.wait_for(door.server.stop(60), timeout=10)


def self_signed(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-addext", names, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key


async def test_tls_is_served_with_a_certificate(door: Door, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    app = door.server._app
    server = HttpServer(app, host="127.0.0.1", port=0, tls_cert=certificate, tls_key=key)
    await server.start()
    context = ssl.create_default_context(cafile=str(certificate))
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        response = await client.get(f"https://127.0.0.1:{server.port}/health/live")
    assert response.status_code == 200

    def use() -> bool:
        with Client(f"https://127.0.0.1:{server.port}", certificate=certificate) as client:
            return client.status().ready

    assert await asyncio.to_thread(use)
    await server.stop(1)


async def test_an_unreadable_certificate_is_a_configuration_error(door: Door, tmp_path: Path) -> None:
    server = HttpServer(
        door.server._app, host="127.0.0.1", port=0, tls_cert=tmp_path / "none.pem", tls_key=tmp_path / "none.key"
    )
    with pytest.raises(ConfigError, match=r"http\.tls_cert .*none\.pem cannot be read"):
        await server.start()


async def test_twenty_starts_and_stops_leave_no_socket_behind() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async with Door().open():
        pass
    before = open_files()
    for _ in range(20):
        door = Door()
        app = create_app(
            answers=door.answers,
            documents=door.documents,
            status=door.status,
            metrics=bytes,
            chats=ChatPool(None),
            embedders=EmbedderPool(None),
            rollouts=NOBODY,
            profiles=NOBODY,
            inspections=NOBODY,
            api_key=None,
            max_body_bytes=LIMIT,
        )
        server = HttpServer(app, host="127.0.0.1", port=0)
        await server.start()
        await server.stop(1)
    assert open_files() <= before


def test_every_error_of_the_tree_has_a_problem_document() -> None:
    from edged.gateway.exchange import problem as render

    def tree(root: type[EdgedError]) -> list[type[EdgedError]]:
        return [root, *(child for branch in root.__subclasses__() for child in tree(branch))]

    for kind in tree(EdgedError):
        status, body = render(kind("x"))
        assert 400 <= status <= 599
        assert body["code"] == kind.code
