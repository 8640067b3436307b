"""The probe's process: it listens, and tells each client once a second what that client's processes did.

One thread, no event loop: between two samples there is nothing to do. Who may connect may watch the processes of the
same user, root all of them.
"""

import contextlib
import os
import selectors
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import structlog

from edged.errors import ProbeError
from edged.probe import procfs
from edged.probe.protocol import MAX_WATCH_BYTES, MAX_WATCHED, decode_watch, encode
from edged.probe.sample import Sample, Step, Watched
from edged.probe.sampler import Sampler
from edged.runtime.notify import Notifier
from edged.workers.protocol import FrameBuffer, FrameError

EVERY_SECONDS: Final = 1.0
MOST_CLIENTS: Final = 8
FORBIDDEN_MODE: Final = 0o117
"""The socket is for its user and group."""
CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: process, user, group
ROOT: Final = 0


class Client:
    """A connection. ``watching`` is what it may watch of what it asked for; None before it has asked."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        self.pid: int
        self.user: int
        self.pid, self.user, _ = CREDENTIALS.unpack(credentials)
        self.connection = connection
        self.watching: tuple[Watched, ...] | None = None
        self._frames = FrameBuffer(MAX_WATCH_BYTES)

    def hear(self) -> None:
        """Take in what was sent.

        Raises :class:`EOFError` when the client is gone, :class:`FrameError` or :class:`ProbeError` when it says what
        is not understood.
        """
        data = self.connection.recv(MAX_WATCH_BYTES)
        if not data:
            raise EOFError
        for payload in self._frames.feed(data):
            wanted = list(dict.fromkeys(decode_watch(payload).processes))[:MAX_WATCHED]
            self.watching = tuple(watched for watched in wanted if self._may_watch(watched.pid))

    def tell(self, sample: Sample) -> None:
        """Its part of the sample. Raises ``OSError`` when it is gone, or has not listened for a long time."""
        mine = {(watched.name, watched.pid) for watched in self.watching or ()}
        processes = tuple(each for each in sample.processes if (each.name, each.pid) in mine)
        frame = encode(msgspec.structs.replace(sample, processes=processes))
        if self.connection.send(frame) < len(frame):
            raise BlockingIOError("it does not listen")

    def _may_watch(self, pid: int) -> bool:
        return self.user == ROOT or procfs.owner_of(pid) == self.user


class Server:
    """Serves clients until :meth:`stop`. It measures only while there is one that asked for something."""

    def __init__(self, listener: socket.socket, sampler: Sampler, notifier: Notifier) -> None:
        listener.setblocking(False)
        self._sampler = sampler
        self._notifier = notifier
        self._clients: list[Client] = []
        self._is_stopping = False
        self._step: Step | None = None
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda woken: woken.recv(1))
        self._log = structlog.get_logger("probe")

    def stop(self) -> None:
        """From a signal handler or another thread."""
        self._is_stopping = True
        with contextlib.suppress(BlockingIOError):
            self._waker.send(b"\0")

    def run(self) -> None:
        due = time.monotonic() + EVERY_SECONDS
        while not self._is_stopping:
            pause_seconds = max(0.0, due - time.monotonic()) if self._has_work() else None
            for key, _ in self._selector.select(pause_seconds):
                key.data(key.fileobj)
            moment = time.monotonic()
            if moment >= due:
                due = max(due + EVERY_SECONDS, moment)
                self._tick()

    def close(self) -> None:
        for client in list(self._clients):
            self._drop(client, "the probe ends")
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def _has_work(self) -> bool:
        return bool(self._clients) or self._sampler.is_loading

    def _tick(self) -> None:
        if not self._has_work():
            return
        sample = self._sampler.sample(time.time())
        if sample.step is not self._step:
            self._step = sample.step
            self._notifier.status(f"measuring by {sample.step}{': ' * bool(sample.reason)}{sample.reason}")
        for client in [client for client in self._clients if client.watching is not None]:
            try:
                client.tell(sample)
            except OSError as error:
                self._drop(client, str(error))

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        if len(self._clients) >= MOST_CLIENTS:
            self._log.warning("probe_client_refused", reason=f"there are {MOST_CLIENTS} already")
            connection.close()
            return
        client = Client(connection)
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, lambda _: self._hear(client))
        self._log.info("probe_client", pid=client.pid, user=client.user)

    def _hear(self, client: Client) -> None:
        try:
            client.hear()
        except (EOFError, OSError, FrameError, ProbeError) as error:
            self._drop(client, str(error) or "it is gone")
        else:
            self._watch()

    def _drop(self, client: Client, reason: str) -> None:
        self._clients.remove(client)
        self._selector.unregister(client.connection)
        client.connection.close()
        self._log.info("probe_client_left", pid=client.pid, reason=reason)
        self._watch()

    def _watch(self) -> None:
        every = (watched for client in self._clients for watched in client.watching or ())
        self._sampler.watch(list(dict.fromkeys(every)))


def serve(path: Path, highest: Step, notifier: Notifier) -> None:
    """Run the probe until SIGTERM or SIGINT. Raises :class:`ProbeError` where it cannot listen."""
    sampler = Sampler(highest, is_alone=True)
    with contextlib.closing(sampler), _listening(path) as listener:
        server = Server(listener, sampler, notifier)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: server.stop())
        notifier.ready()
        with contextlib.closing(server):
            server.run()
        notifier.stopping()


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket that only its user and group can open; what a killed probe left there goes first."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(FORBIDDEN_MODE)
        try:
            _clear(path)
            listener.bind(str(path))
        except OSError as error:
            raise ProbeError(f"cannot listen at {path}: {error.strerror}", hint="give another --socket") from error
        finally:
            os.umask(before)
        listener.listen()
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Remove a socket that nobody serves."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
        try:
            tried.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ProbeError(f"another probe serves at {path}")
