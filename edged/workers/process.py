"""One worker process and its connection: started, spoken to, ended. Knows nothing of requests or restarts."""

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from edged.errors import WorkerError
from edged.workers.protocol import (
    FrameBuffer,
    FrameError,
    Ready,
    Reply,
    Request,
    WorkerSettings,
    decode_reply,
    encode,
)

ENGINE_COMMAND = (sys.executable, "-m", "edged.engine")
LOAD_TIMEOUT_SECONDS = 120.0

COMPUTE_ENVIRONMENT = {"GOMP_SPINCOUNT": "3000", "OPENBLAS_NUM_THREADS": "1"}
"""How long compute threads spin before they sleep while they wait for the next step (libgomp; its default is 300,000
turns), and that NumPy has no threads beside them. At the barriers within a step they wait as scripts/llama/barrier.c
says, where llama.cpp was compiled with it.

Measured with SmolLM2 on 2 cores, 2 threads, side by side, with libgomp's barriers, milliseconds a token: alone 7.6-8.2
with 3,000 turns, 10.9 with 400, about 20 without spinning; beside one busy process 51 with 3,000 turns, 22 with 400,
100-500 with the default.
Such a neighbour costs a thread within two seconds, and one thread waits for nobody (12).
"""
LAST_WORDS_BYTES = 4096

OnSpawn = Callable[[int], Awaitable[None]]
"""Told the process id of a child that runs and has not loaded its model: the moment to confine it."""


async def unconfined(_pid: int) -> None:
    """Leave the child where it is."""


class WorkerProcess:
    """A running child. Use :meth:`start`; the socket's file is gone once the child has connected."""

    def __init__(self, child: "_Child", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._child = child
        self._reader = reader
        self._writer = writer
        self._frames = FrameBuffer()
        self._payloads: deque[bytes] = deque()
        self.ready: Ready

    @classmethod
    async def start(
        cls,
        settings: WorkerSettings,
        socket_path: Path,
        command: Sequence[str] = ENGINE_COMMAND,
        *,
        load_timeout_seconds: float = LOAD_TIMEOUT_SECONDS,
        on_spawn: OnSpawn = unconfined,
    ) -> "WorkerProcess":
        """Spawn the worker and wait until its model is loaded.

        Raises :class:`WorkerError`: with the worker's last words when it ends or stalls before that, with the system's
        when it cannot be started.
        """
        try:
            listener = _listen(socket_path)
            try:
                child = await _Child.spawn(settings, socket_path, command)
                return await cls._load(settings, listener, child, load_timeout_seconds, on_spawn)
            finally:
                listener.close()
                socket_path.unlink(missing_ok=True)
        except OSError as error:
            raise WorkerError(
                f"the {settings.kind} worker cannot be started: {error}",
                hint="check free memory, free disk space and the rights on the home directory",
            ) from error

    @classmethod
    async def _load(
        cls,
        settings: WorkerSettings,
        listener: socket.socket,
        child: "_Child",
        timeout_seconds: float,
        on_spawn: OnSpawn,
    ) -> "WorkerProcess":
        try:
            async with asyncio.timeout(timeout_seconds):
                await on_spawn(child.process.pid)
                return await cls._meet(listener, child)
        except BaseException as error:
            ending = await child.reap(grace_seconds=1.0 if isinstance(error, WorkerError) else 0.0)
            if not isinstance(error, WorkerError | FrameError | TimeoutError):
                raise
            raise WorkerError(
                f"the {settings.kind} worker did not become ready: {ending}",
                hint="check the model file with 'edged models verify'",
                model=settings.model,
            ) from error

    @classmethod
    async def _meet(cls, listener: socket.socket, child: "_Child") -> "WorkerProcess":
        reader, writer = await _accept(listener, child.process)
        worker = cls(child, reader, writer)
        try:
            async with contextlib.aclosing(worker.replies()) as replies:
                first = await anext(replies, None)
            if not isinstance(first, Ready):
                raise WorkerError(f"expected the worker to say it is ready, not {first!r}")
        except BaseException:
            writer.close()
            raise
        worker.ready = first
        return worker

    @property
    def pid(self) -> int:
        return self._child.process.pid

    def send(self, request: Request) -> None:
        """Queue a request for the child; a broken connection shows as the end of :meth:`replies`."""
        if not self._writer.is_closing():
            self._writer.write(encode(request))

    async def replies(self) -> AsyncGenerator[Reply, None]:
        """Replies in order until the child hangs up. Raises :class:`FrameError` for garbage."""
        try:
            while True:
                while self._payloads:
                    yield decode_reply(self._payloads.popleft())
                data = await self._reader.read(1 << 16)
                if not data:
                    return
                self._payloads.extend(self._frames.feed(data))
        except ConnectionError:
            return

    def hang_up(self) -> None:
        """Tell the child to end; :meth:`replies` end too."""
        # Not close(): it would first write out everything to a child that may have stopped reading.
        self._writer.transport.abort()

    async def end(self, grace_seconds: float = 5.0) -> str:
        """Hang up, wait, and kill what is still there. Returns how it ended, with its last words."""
        self.hang_up()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        return await self._child.reap(grace_seconds)


class _Child:
    """The operating system's side of a worker: its process and what it writes to stderr."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        self.process = process
        # Read all along: a full pipe would stop the child in the middle of its work.
        self._words = asyncio.create_task(_last_words(process.stderr), name="worker-stderr")

    @classmethod
    async def spawn(cls, settings: WorkerSettings, socket_path: Path, command: Sequence[str]) -> "_Child":
        spawning = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *command,
                str(socket_path),
                msgspec.json.encode(settings).decode(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **COMPUTE_ENVIRONMENT, "OMP_NUM_THREADS": str(settings.threads)},
            ),
            name="worker-spawn",
        )
        try:
            return cls(await asyncio.shield(spawning))
        except asyncio.CancelledError:
            # Before Python 3.11.4 (Debian 12 has 3.11.2) a spawn cut off in the middle leaves its child running.
            with contextlib.suppress(OSError):
                await cls(await spawning).reap(grace_seconds=0.0)
            raise

    async def reap(self, grace_seconds: float) -> str:
        """Wait for the end, by SIGKILL after the grace; returns the exit status and the last words."""
        # Not asyncio.timeout(): in a task that is being cancelled it never expires before Python 3.11.3.
        ended = asyncio.create_task(self.process.wait(), name="worker-end")
        await asyncio.wait([ended], timeout=grace_seconds)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        status = await ended
        words = await self._words
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"{ending}: {words}" if words else ending


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # left over by a daemon that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    # fchmod before bind sets the mode of the socket's file with no moment at which others could connect.
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(1)
    return listener


async def _accept(
    listener: socket.socket, process: asyncio.subprocess.Process
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The child's connection; anybody else's is closed. Ends with an error when the child exits first."""
    loop = asyncio.get_running_loop()
    happened = asyncio.Event()
    ended = asyncio.create_task(process.wait(), name="worker-exit")
    ended.add_done_callback(lambda _: happened.set())
    # Not sock_accept(): cancelled at the wrong moment, it would leave a connection open.
    loop.add_reader(listener, happened.set)
    try:
        while True:
            await happened.wait()
            happened.clear()
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                if ended.done():
                    raise WorkerError("the worker ended before it connected") from None
                continue
            if _peer_pid(connection) == process.pid:
                return await asyncio.open_unix_connection(sock=connection)
            connection.close()
            happened.set()  # who else is there, or that the child has ended, has been told already
    finally:
        loop.remove_reader(listener)
        ended.cancel()


def _peer_pid(connection: socket.socket) -> int:
    """Process id of the peer, from SO_PEERCRED of unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


async def _last_words(stderr: asyncio.StreamReader) -> str:
    tail = b""
    while data := await stderr.read(LAST_WORDS_BYTES):
        tail = (tail + data)[-LAST_WORDS_BYTES:]
    lines = tail.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
