"""Profiles for a coordinator on this device: a Unix socket that gives each second as a line of JSON.

Who reads too slowly is disconnected: what nobody takes must not pile up here.
"""

import asyncio
import os
import socket
from pathlib import Path
from typing import Final

import structlog

from edged.probe.profile import to_json
from edged.probe.profiles import Profiles

SOCKET_MODE: Final = 0o660
MAX_READERS: Final = 16
MAX_UNREAD_BYTES: Final = 256 * 1024
"""Of one reader: about half a minute of profiles."""


class Broadcast:
    """Serves ``path``, whose folder is there; :meth:`run` is one supervised service."""

    def __init__(self, profiles: Profiles, path: Path) -> None:
        self._profiles = profiles
        self._path = path
        self._readers: set[asyncio.Transport] = set()
        self._log = structlog.get_logger("broadcast")

    @property
    def readers(self) -> int:
        return len(self._readers)

    async def run(self) -> None:
        """Listen and send until cancelled."""
        loop, listener = asyncio.get_running_loop(), _listen(self._path)
        # Started apart: cancelled while it starts, it would leave the socket open.
        server = await loop.create_unix_server(lambda: _Reader(self), sock=listener, start_serving=False)
        try:
            await server.start_serving()
            async for second in self._profiles.seconds():
                self.send(to_json(second) + b"\n")
        finally:
            server.close()
            for reader in tuple(self._readers):
                reader.abort()
            self._path.unlink(missing_ok=True)

    def send(self, line: bytes) -> None:
        """To all readers that keep up."""
        for reader in tuple(self._readers):
            if reader.get_write_buffer_size() + len(line) > MAX_UNREAD_BYTES:
                self._log.warning("profile_reader_dropped", unread_bytes=reader.get_write_buffer_size())
                reader.abort()
            else:
                reader.write(line)

    def came(self, reader: asyncio.Transport) -> None:
        """Let somebody read, as long as there are not too many."""
        if len(self._readers) >= MAX_READERS:
            self._log.warning("profile_reader_refused", readers=len(self._readers))
            reader.abort()
        else:
            self._readers.add(reader)

    def went(self, reader: asyncio.Transport) -> None:
        self._readers.discard(reader)


class _Reader(asyncio.Protocol):
    """A connection; what comes over it is ignored."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._broadcast.came(transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's name
        if self._transport is not None:
            self._broadcast.went(self._transport)


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # left over by a daemon that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    # fchmod before bind sets the mode of the socket's file with no moment at which others could connect.
    os.fchmod(listener.fileno(), SOCKET_MODE)
    listener.bind(str(path))
    path.chmod(SOCKET_MODE)
    listener.listen(MAX_READERS)
    return listener
