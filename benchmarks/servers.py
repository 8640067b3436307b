"""edged's daemon and llama-server as processes with an OpenAI door each, and the cheap client that asks both.

The client shares the cores with what it measures: it speaks HTTP/1.1 by hand, notes the time of each chunk, and looks
into the chunks only after the last one has come.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.ports import find_free_port

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 300.0
START_SECONDS = 300.0  # on an emulated board with a third of a core, a daemon imports for minutes
POLL_SECONDS = 0.1
LAST_WORDS_BYTES = 2000

Messages = Sequence[tuple[str, str]]
Contender = TypeVar("Contender")


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What both servers are given: the same file, threads, KV cells and sequences. 0 threads: as each chooses.

    ``widen``: edged may make an eight-bit copy of the file, as it does at its installation.
    """

    model: Path
    threads: int
    widen: bool = False
    context_tokens: int = 8192
    sequences: int = 16


class Server(msgspec.Struct, frozen=True):
    """A server that answers. ``model`` is what it calls its chat model."""

    name: str
    port: int
    model: str


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A streamed completion. ``pieces`` are (time of arrival, text), in seconds of the monotonic clock."""

    asked: float
    ended: float
    pieces: tuple[tuple[float, str], ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def first_seconds(self) -> float:
        """From the request to the first text; to the end where there was none."""
        return (self.pieces[0][0] if self.pieces else self.ended) - self.asked

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.pieces)


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None


# --- asking ----------------------------------------------------------------------------------------


async def complete(
    server: Server, prompt: str, max_tokens: int, *, on_chunk: Callable[[], None] = lambda: None
) -> Reply:
    """Continue a raw text greedily."""
    return await _stream(server, "/v1/completions", {"prompt": prompt}, max_tokens, on_chunk)


async def chat(server: Server, messages: Messages, max_tokens: int) -> Reply:
    """Answer chat messages greedily; the template is the model file's own."""
    body = {"messages": [{"role": role, "content": content} for role, content in messages]}
    return await _stream(server, "/v1/chat/completions", body, max_tokens, lambda: None)


async def _stream(
    server: Server, path: str, body: Mapping[str, object], max_tokens: int, on_chunk: Callable[[], None]
) -> Reply:
    options = {"model": server.model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    payload = msgspec.json.encode({**body, **options, "stream_options": {"include_usage": True}})
    chunks: list[tuple[float, bytes]] = []
    asked = time.monotonic()
    async with asyncio.timeout(PATIENCE_SECONDS), contextlib.aclosing(_post(server, path, payload)) as arriving:
        async for chunk in arriving:
            chunks.append((time.monotonic(), chunk))
            on_chunk()
    return _reply(asked, time.monotonic(), chunks)


async def _post(server: Server, path: str, payload: bytes) -> AsyncGenerator[bytes, None]:
    """The body of the answer, chunk by chunk as the server sent them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    try:
        answered = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in answered.split(b"\r\n", 1)[0] or b"transfer-encoding: chunked" not in answered:
            said = answered + await reader.read(LAST_WORDS_BYTES)
            raise RuntimeError(f"{server.name} does not stream: {said.decode(errors='replace')}")
        while size := int(await reader.readline(), 16):
            yield (await reader.readexactly(size + 2))[:-2]
    finally:
        writer.close()


def _reply(asked: float, ended: float, chunks: Sequence[tuple[float, bytes]]) -> Reply:
    pieces: list[tuple[float, str]] = []
    finish_reason, usage = "", None
    for moment, data in _events(chunks):
        event = msgspec.json.decode(data, type=_Event)
        usage = event.usage or usage
        for choice in event.choices:
            finish_reason = choice.finish_reason or finish_reason
            text = choice.text or (choice.delta.content if choice.delta else None)
            if text:
                pieces.append((moment, text))
    if usage is None or not finish_reason:
        raise RuntimeError(f"a stream broke off: {chunks[-1:]}")
    return Reply(
        asked=asked,
        ended=ended,
        pieces=tuple(pieces),
        finish_reason=finish_reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0,
    )


def _events(chunks: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """The data of each server-sent event and when its end arrived; chunks may cut an event anywhere."""
    events, rest = [], b""
    for moment, chunk in chunks:
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        lines = (each.strip() for each in whole)
        events += [(moment, line.removeprefix(b"data:").strip()) for line in lines if line.startswith(b"data:")]
    return [(moment, data) for moment, data in events if data != b"[DONE]"]


def in_turn(contenders: Sequence[Contender], number: int) -> Sequence[Contender]:
    """Who goes first changes, and whom one comes after: every second round is in reverse."""
    start = number // 2 % len(contenders)
    order = [*contenders[start:], *contenders[:start]]
    return order[::-1] if number % 2 else order


def numbered(serial: Iterator[int], prompts: Sequence[str]) -> list[str]:
    """Prompts that share next to nothing with what was asked before: what is measured is not what was kept."""
    return [f"{next(serial)}. {each}" for each in prompts]


# --- serving ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def edged(
    setup: Setup, *, name: str = "edged", settings: Mapping[str, str] | None = None, launcher: Sequence[str] = ()
) -> AsyncIterator[Server]:
    """A whole daemon over an empty home, without a broker. ``settings`` are further ``EDGED_*`` variables.

    ``launcher`` is put before the command, and runs it in its own process.
    """
    with tempfile.TemporaryDirectory(prefix="edged-engine-") as home:
        port = find_free_port()
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("EDGED_")},
            "EDGED_HOME": home,
            "EDGED_HTTP__LISTEN": f"127.0.0.1:{port}",
            "EDGED_MQTT__ENABLED": "false",
            "EDGED_LOG__LEVEL": "error",
            "EDGED_CHAT__PATH": str(setup.model),
            "EDGED_CHAT__THREADS": str(setup.threads),
            "EDGED_CHAT__CONTEXT_TOKENS": str(setup.context_tokens),
            "EDGED_CHAT__SEQUENCES": str(setup.sequences),
            **(settings or {}),
        }
        edged_command = [sys.executable, "-m", "edged.cli"]
        if setup.widen:
            widening = await asyncio.create_subprocess_exec(
                *edged_command, "models", "widen", cwd=ROOT, env=environment, stdout=asyncio.subprocess.DEVNULL
            )
            if await widening.wait() != 0:
                raise SystemExit("'edged models widen' failed")
        command = [*launcher, *edged_command, "serve"]
        async with _served(name, port, command, environment) as server:
            yield server


def llama_server_command(program: Path, setup: Setup, *, unified: bool) -> list[str]:
    """llama-server with its own defaults but for what must be the same on both.

    With a number of slots given it parts the KV cells among them, so that none holds a long prompt: ``unified`` shares.
    It forgets the system text where that is less than a tenth of a prompt, unless told to keep also that.
    """
    return [
        *(str(program), "-m", str(setup.model), "-np", str(setup.sequences)),
        *(("-t", str(setup.threads)) if setup.threads else ()),
        *("-c", str(setup.context_tokens), "--kv-unified" if unified else "--no-kv-unified"),
        *("--slot-prompt-similarity", "0.01"),
    ]


@contextlib.asynccontextmanager
async def llama_server(
    program: Path,
    setup: Setup,
    *,
    name: str = "llama-server",
    unified: bool = True,
    launcher: Sequence[str] = (),
) -> AsyncIterator[Server]:
    """llama-server over the same file; libgomp spins at barriers as it does by default. ``launcher`` as for edged."""
    port = find_free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_", "LLAMA_"))}
    command = [*llama_server_command(program, setup, unified=unified), "--host", "127.0.0.1", "--port", str(port)]
    command = [*launcher, *command]
    async with _served(name, port, command, environment) as server:
        yield server


@contextlib.asynccontextmanager
async def _served(
    name: str, port: int, command: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[Server]:
    """A process that listens on ``port``, once it generates; ended afterwards."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            server = await _ready(name, port, process)
            if server is None:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
                raise SystemExit(f"{name} does not serve: {log.read().decode(errors='replace')}")
            yield server
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _ready(name: str, port: int, process: asyncio.subprocess.Process) -> Server | None:
    """Ask for a token until one comes; None when the process ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=START_SECONDS) as client:
        while process.returncode is None and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                models = await client.get("/v1/models")
                if models.is_success:
                    model = str(models.json()["data"][0]["id"])
                    body = {"model": model, "prompt": "One, two,", "max_tokens": 1}
                    if (await client.post("/v1/completions", json=body)).is_success:
                        return Server(name, port, model)
            await asyncio.sleep(POLL_SECONDS)
    return None


async def cut_to_tokens(server: Server, text: str, tokens: int) -> str:
    """The beginning of ``text`` that has about so many tokens, by llama-server's own doors for it."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        found = (await client.post("/tokenize", json={"content": text})).json()["tokens"]
        if len(found) < tokens:
            raise SystemExit(f"the text has {len(found)} tokens, {tokens} are needed")
        return str((await client.post("/detokenize", json={"tokens": found[:tokens]})).json()["content"])
