"""Profiles for a coordinator on the device: a Unix socket, its readers, and those who read too slowly."""

import asyncio
import contextlib
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from edged.probe import broadcast as broadcasting
from edged.probe.broadcast import MAX_READERS, Broadcast
from edged.probe.profile import Device, Warmth, from_json
from edged.probe.profiles import Profiles
from edged.runtime.health import Health
from edged.runtime.supervise import Supervisor
from tests.samples import NOW, process, sample


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something has come about that has no event of its own."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


class Rig:
    """A served socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "profile.sock"
        self.profiles = Profiles(Device(id="pi", software="1", cores={0: 1.0}))
        self.broadcast = Broadcast(self.profiles, self.path)
        self.told = 0
        self.connections: list[asyncio.StreamWriter] = []

    def tell(self) -> None:
        self.told += 1
        self.profiles.add(sample(process(), at=NOW + self.told), [], Warmth())

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await until(self.path.exists)
        before = self.broadcast.readers
        reader, writer = await asyncio.open_unix_connection(self.path)
        self.connections.append(writer)
        await until(lambda: self.broadcast.readers > before or before == MAX_READERS)
        return reader, writer


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    supervisor = Supervisor(Health())
    supervisor.start("socket", made.broadcast.run)
    yield made
    await supervisor.stop_all()
    for writer in made.connections:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    assert not made.path.exists()
    assert made.broadcast.readers == 0


async def test_every_reader_gets_each_second_as_a_line(rig: Rig) -> None:
    readers = [await rig.connect() for _ in range(3)]
    rig.tell()
    for reader, _ in readers:
        assert from_json(await reader.readline()).at == NOW + 1
    rig.tell()
    for reader, _ in readers:
        assert from_json(await reader.readline()).at == NOW + 2


async def test_the_socket_is_for_the_owner_and_the_group(rig: Rig) -> None:
    await rig.connect()
    assert stat.S_IMODE(rig.path.stat().st_mode) == 0o660


async def test_who_does_not_read_is_dropped_and_the_others_go_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcasting, "MAX_UNREAD_BYTES", 16_384)
    lazy = socket.socket(socket.AF_UNIX)
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader, _ = await rig.connect()
    lazy.setblocking(False)
    await asyncio.get_running_loop().sock_connect(lazy, str(rig.path))
    await until(lambda: rig.broadcast.readers == 2)
    while rig.broadcast.readers == 2:
        rig.tell()
        assert from_json(await reader.readline()).at == NOW + rig.told
    rig.tell()
    assert from_json(await reader.readline()).at == NOW + rig.told
    lazy.close()


async def test_more_readers_than_there_is_room_for_are_refused(rig: Rig) -> None:
    admitted = [await rig.connect() for _ in range(MAX_READERS)]
    refused, _ = await rig.connect()
    assert await refused.read() == b""
    admitted[0][1].close()
    await until(lambda: rig.broadcast.readers < MAX_READERS)
    reader, _ = await rig.connect()
    rig.tell()
    assert from_json(await reader.readline()).device == "pi"


async def test_what_a_killed_daemon_left_is_no_obstacle(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(made.path))
    left.close()
    supervisor = Supervisor(Health())
    supervisor.start("socket", made.broadcast.run)
    await until(lambda: made.path.exists() and stat.S_IMODE(made.path.stat().st_mode) == 0o660)
    await supervisor.stop_all()
    assert not made.path.exists()
