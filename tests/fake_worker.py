"""A worker without a model: speaks the protocol like ``python -m edged.engine SOCKET SETTINGS``, and fails as told.

What to do is told by words in the environment variable FAKE_WORKER and in a file named like the model with ``.words``
behind it, or in a prompt for that request alone:

    ACTION@MOMENT  kill, segv, exit, hang, compute, garbage or long-frame at start, request or stream (after one piece)
    counter=PATH   every ACTION adds a byte to this file, ...
    times=N        ... and none happens once the file has N bytes
    while=PATH     ACTIONs happen only while this file exists
    tokens=N       the answer is N words; else it is what follows the prompt's first "- ": the first fact of a question
    compute=S      seconds that compute takes, in which nothing is said; else it is for ever
    pause=S        seconds between two words
    alive=S        seconds between two signs of life (1)
    deaf           hanging up and SIGTERM change nothing
    babble         the answer is one word for ever
    alike          all texts have the same embedding
    salt=WORD      embeddings are of the texts with this word before them

Without words it answers at once. An embedding has 384 dimensions: the sum of its words' hashes, so texts that share
words are near each other.
"""

import asyncio
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
import signal
import struct
import sys
import time
from pathlib import Path

import msgspec

from edged.workers.protocol import (
    MAX_FRAME_BYTES,
    Alive,
    Cancel,
    Embed,
    Failed,
    Finished,
    FrameBuffer,
    Generate,
    Inspect,
    Piece,
    Ready,
    Reply,
    Request,
    Tune,
    Vectors,
    WorkerSettings,
    decode_request,
    encode,
)

DIMENSIONS = 384
PR_SET_PDEATHSIG = 1
_ACTION = re.compile(r"^(kill|segv|exit|hang|compute|garbage|long-frame)@(start|request|stream)$")


class Words:
    """What the worker, or one request, was told."""

    def __init__(self, text: str) -> None:
        words = text.split()
        self._actions = {found[2]: found[1] for word in words if (found := _ACTION.match(word))}
        self._values = dict(word.split("=", 1) for word in words if "=" in word)
        self.deaf = "deaf" in words
        self.babble = "babble" in words
        self.alike = "alike" in words
        self.salt = self._values.get("salt", "")

    def number(self, name: str, default: float) -> float:
        return float(self._values.get(name, default))

    def action(self, moment: str) -> str | None:
        """What to do at this moment; counted, where a counter is named."""
        action: str | None = self._actions.get(moment)
        obstacle = self._values.get("while")
        if action is None or (obstacle is not None and not Path(obstacle).exists()):
            return None
        if "counter" in self._values:
            counter = Path(self._values["counter"])
            done = counter.stat().st_size if counter.exists() else 0
            if done >= self.number("times", math.inf):
                return None
            with counter.open("ab") as file:
                file.write(b".")
        return action


class FakeWorker:
    """One connection. Requests are answered concurrently, each by its own task."""

    def __init__(self, settings: WorkerSettings, words: Words, writer: asyncio.StreamWriter) -> None:
        self._settings = settings
        self._words = words
        self._writer = writer
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Answer until the daemon hangs up."""
        self._misbehave("start", self._words)
        system = "a fake worker has no CPU features"
        self._send(
            Ready(
                pid=os.getpid(),
                description="fake",
                context_tokens=self._settings.context_tokens,
                dimensions=DIMENSIONS,
                system=system,
            )
        )
        breathing = asyncio.create_task(self._breathe())
        frames = FrameBuffer()
        while data := await reader.read(1 << 16):
            for payload in frames.feed(data):
                self._handle(decode_request(payload))
        breathing.cancel()
        if self._words.deaf:
            hang()

    def _handle(self, request: Request) -> None:
        if isinstance(request, Tune):
            return
        if isinstance(request, Inspect):
            self._send(Failed(request.id, "inspection_unavailable", "a fake worker cannot be looked into"))
            return
        if isinstance(request, Cancel):
            if (task := self._tasks.pop(request.id, None)) is not None:
                task.cancel()
            return
        work = self._generate(request) if isinstance(request, Generate) else self._embed(request)
        self._tasks[request.id] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(request.id, None))

    async def _generate(self, request: Generate) -> None:
        try:
            async with asyncio.timeout(request.deadline_seconds):
                await self._speak(request, "".join(segment.text for segment in request.prompt))
        except TimeoutError:
            self._send(Failed(request.id, "deadline_exceeded", "too late"))

    async def _speak(self, request: Generate, prompt: str) -> None:
        started = time.monotonic()
        words = Words(prompt)
        self._misbehave("request", words)
        prompt_tokens = len(prompt.split())
        if prompt_tokens >= self._settings.context_tokens:
            self._send(Failed(request.id, "prompt_too_long", f"the prompt has {prompt_tokens} tokens"))
            return
        answer = [" la"] * request.max_tokens if self._words.babble else _answer(prompt, words)
        pause = words.number("pause", self._words.number("pause", 0.0))
        for number, piece in enumerate(answer[: request.max_tokens]):
            if pause:
                await asyncio.sleep(pause)
            self._send(Piece(request.id, piece))
            if not number:
                await self._writer.drain()
                self._misbehave("stream", words)
        milliseconds = (time.monotonic() - started) * 1e3
        self._send(
            Finished(
                id=request.id,
                reason="stop" if len(answer) <= request.max_tokens else "length",
                prompt_tokens=prompt_tokens,
                completion_tokens=min(len(answer), request.max_tokens),
                queue_ms=0.0,
                prefill_ms=0.0,
                generate_ms=milliseconds,
            )
        )

    async def _embed(self, request: Embed) -> None:
        words = Words(" ".join(request.texts))
        self._misbehave("request", words)
        if pause := words.number("pause", self._words.number("pause", 0.0)):
            await asyncio.sleep(pause)
        tokens = sum(len(text.split()) for text in request.texts)
        texts = ["" if self._words.alike else f"{self._words.salt} {text}" for text in request.texts]
        self._send(Vectors(request.id, DIMENSIONS, b"".join(map(vector, texts)), tokens))

    async def _breathe(self) -> None:
        while True:
            await asyncio.sleep(self._words.number("alive", 1.0))
            if self._tasks:
                self._send(Alive())

    def _misbehave(self, moment: str, words: Words) -> None:
        match words.action(moment) or (words is not self._words and self._words.action(moment)):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os.write(sys.stderr.fileno(), b"out of luck\n")
                os._exit(1)
            case "hang":
                hang()
            case "compute":
                compute(words.number("compute", math.inf))
            case "garbage":
                self._writer.write(struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1")
            case "long-frame":
                self._writer.write(struct.pack("<I", MAX_FRAME_BYTES + 1))

    def _send(self, reply: Reply) -> None:
        self._writer.write(encode(reply))


def hang() -> None:
    """Be there and do nothing: not even notice that the daemon hung up."""
    while True:
        time.sleep(3600)


def compute(seconds: float) -> None:
    """Use a core for so long, and notice nothing else."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def vector(text: str) -> bytes:
    """A deterministic float32 vector of unit length; the more words two texts share, the nearer they are."""
    parts = [_word_vector(word) for word in re.findall(r"\w+", text.lower())] or [_word_vector("")]
    total = [sum(column) for column in zip(*parts, strict=True)]
    length = math.hypot(*total)
    return struct.pack(f"<{DIMENSIONS}f", *(value / length for value in total))


@functools.lru_cache(maxsize=4096)
def _word_vector(word: str) -> tuple[float, ...]:
    return tuple(byte - 127.5 for byte in hashlib.shake_128(word.encode("utf-8", "replace")).digest(DIMENSIONS))


def _answer(prompt: str, words: Words) -> list[str]:
    """The pieces of an answer: a word each, with the space before it."""
    facts = re.findall(r"(?:^|\W)- (.*)", prompt)  # the first one may follow the template's mark of the user's turn
    tokens = int(words.number("tokens", 0))
    text = " ".join(f"word{number}" for number in range(tokens)) if tokens else next(iter(facts), "All is well.")
    return re.findall(r"\s*\S+", text)


async def main() -> None:
    """Connect, and serve until the daemon hangs up."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = msgspec.json.decode(sys.argv[2], type=WorkerSettings)
    own = Path(f"{settings.model}.words")
    words = Words(f"{os.environ.get('FAKE_WORKER', '')} {own.read_text() if own.exists() else ''}")
    if words.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reader, writer = await asyncio.open_unix_connection(sys.argv[1])
    with contextlib.suppress(ConnectionError):
        await FakeWorker(settings, words, writer).serve(reader)


if __name__ == "__main__":
    asyncio.run(main())
