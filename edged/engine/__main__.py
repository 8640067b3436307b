"""A worker process: connects to the daemon's socket, loads its model, computes until the socket closes."""

import contextlib
import ctypes
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from enum import Enum, auto
from pathlib import Path

import msgspec

from edged.engine import locked
from edged.engine.affinity import ThreadCores
from edged.engine.chat import ChatEngine
from edged.engine.embed import EmbedEngine
from edged.engine.inspection import Inspection, InspectionError
from edged.engine.llama import LlamaError, Model, quiet
from edged.workers.protocol import (
    Alive,
    Failed,
    FrameBuffer,
    FrameError,
    Inspect,
    Inspected,
    Ready,
    Reply,
    Request,
    WorkerSettings,
    decode_request,
    encode,
)

ALIVE_EVERY_SECONDS = 1.0
EXIT_MODEL = 3
PR_SET_PDEATHSIG = 1  # prctl(2)


class Nothing(Enum):
    """No request is there now."""

    NOTHING = auto()


Inbox = queue.SimpleQueue[Request | None]


def main() -> int:
    """``python -m edged.engine SOCKET SETTINGS_JSON``; the exit status is 0 when the daemon hung up."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's to handle
    path, raw_settings = sys.argv[1:3]
    settings = msgspec.json.decode(raw_settings, type=WorkerSettings)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    try:
        return _serve(connection, settings)
    except ConnectionError:
        return 0  # the daemon is gone
    except (LlamaError, FrameError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - the daemon reads a worker's last words from its stderr
        return EXIT_MODEL


class _Outgoing:
    """Replies on their way to the daemon: those of one step leave together, in one system call."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames: list[bytes] = []

    def send(self, reply: Reply) -> None:
        self._frames.append(encode(reply))

    def flush(self) -> None:
        if self._frames:
            self._connection.sendall(b"".join(self._frames))
            self._frames.clear()


def _serve(connection: socket.socket, settings: WorkerSettings) -> int:
    quiet()
    if settings.load_mode == "mlock":
        locked.raise_limit()
    model = _load(settings)
    outgoing = _Outgoing(connection)
    kind = ChatEngine if settings.kind == "chat" else EmbedEngine
    engine = kind(model, settings, outgoing.send)
    outgoing.send(_ready(model, engine))
    outgoing.flush()
    # What is here stays: the collector need not look at it again between two tokens, and comes to the rest sooner.
    gc.collect()
    gc.freeze()
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True, name="receive").start()
    with contextlib.closing(Inspection()) as inspection:
        _loop(engine, inbox, outgoing, inspection)
    engine.close()
    model.close()
    return 0


def _load(settings: WorkerSettings) -> Model:
    """The copy, or the model itself where that is gone meanwhile or broken."""
    if settings.copy:
        with contextlib.suppress(LlamaError):
            return Model(Path(settings.copy), load_mode=settings.load_mode, gpu_layers=settings.gpu_layers)
    return Model(Path(settings.model), load_mode=settings.load_mode, gpu_layers=settings.gpu_layers)


def _ready(model: Model, engine: ChatEngine | EmbedEngine) -> Ready:
    from llama_cpp import llama_print_system_info, llama_supports_gpu_offload  # noqa: PLC0415 - used here alone

    return Ready(
        pid=os.getpid(),
        description=model.description,
        context_tokens=engine.context_tokens,
        dimensions=model.dimensions,
        system=llama_print_system_info().decode().strip(),
        gpu=bool(llama_supports_gpu_offload()),
        model_bytes=model.weight_bytes,
        locked_bytes=locked.locked_bytes(),
    )


def _loop(engine: ChatEngine | EmbedEngine, inbox: Inbox, outgoing: _Outgoing, inspection: Inspection) -> None:
    said_alive = time.monotonic()
    cores = ThreadCores()
    in_company = True  # whether what found nothing to do was sent with more, the last time
    while True:
        idle, taken = not engine.busy, 0
        wait_seconds = engine.gather_seconds if idle and in_company else 0.0
        while (request := _next(inbox, engine, wait_seconds)) is not Nothing.NOTHING:
            if request is None:
                return
            taken += 1
            if isinstance(request, Inspect):
                cores.release()  # what records has threads of its own, which begin where the main thread is
                outgoing.send(_inspect(inspection, request))
            else:
                engine.handle(request, time.monotonic())
            if not engine.busy:
                outgoing.flush()
                taken = 0
        engine.step(time.monotonic)
        cores.keep(engine.threads)
        if idle:
            in_company = taken > 1 or not inbox.empty()
        if time.monotonic() - said_alive >= ALIVE_EVERY_SECONDS:
            said_alive = time.monotonic()
            outgoing.send(Alive())
        outgoing.flush()


def _next(inbox: Inbox, engine: ChatEngine | EmbedEngine, wait_seconds: float) -> Request | Nothing | None:
    """The next request: waited for without end where there is nothing to compute."""
    try:
        return inbox.get(timeout=wait_seconds) if engine.busy else inbox.get()
    except queue.Empty:
        return Nothing.NOTHING


def _inspect(inspection: Inspection, request: Inspect) -> Reply:
    try:
        inspection.use(request)
    except InspectionError as error:
        return Failed(request.id, "inspection_unavailable", str(error))
    return Inspected(request.id)


def _receive(connection: socket.socket, inbox: Inbox) -> None:
    """Read requests until the daemon hangs up, then tell the loop by None."""
    frames = FrameBuffer()
    # Always the same memory: a new piece for each call, cut to what came, would leave this thread's heap in tatters.
    buffer = memoryview(bytearray(1 << 16))
    try:
        while count := connection.recv_into(buffer):
            for payload in frames.feed(buffer[:count]):
                inbox.put(decode_request(payload))
    except (OSError, FrameError) as error:
        print(error, file=sys.stderr)  # noqa: T201
    inbox.put(None)


if __name__ == "__main__":
    sys.exit(main())
