"""A whole daemon and its service manager: what is told when, sockets taken over, a configuration read again."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edged.config import Config
from edged.daemon import running
from edged.errors import ConfigError
from edged.reload import Reloader
from edged.runtime.notify import Notifier
from tests.daemon_process import FAKE_WORKER, configure

WAIT_SECONDS = 30


class Manager:
    """The other end of ``$NOTIFY_SOCKET``."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self.notifier = Notifier(str(path), watchdog_seconds=0.3)
        self.told: list[str] = []

    async def hears(self, wanted: str) -> str:
        """The next message that contains this; those before it are in ``told``."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                self.told.append((await loop.sock_recv(self._socket, 4096)).decode())
                if wanted in self.told[-1]:
                    return self.told[-1]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


def settings(home: Path, **overrides: Any) -> Config:
    return configure(home, {"mqtt.enabled": False, "hardware.cgroups": False, **overrides})


async def test_ready_is_told_when_the_door_is_open_then_the_watchdog_is_fed_until_it_stops(
    tmp_path: Path, manager: Manager
) -> None:
    async with running(settings(tmp_path / "home"), worker_command=FAKE_WORKER, notifier=manager.notifier) as server:
        await manager.hears("READY=1")
        assert not any("WATCHDOG" in message for message in manager.told)
        async with httpx.AsyncClient() as client:
            live = await client.get(f"http://127.0.0.1:{server.port}/health/live")
        assert live.status_code == 200
        for _ in range(3):
            await manager.hears("WATCHDOG=1")
    await manager.hears("STOPPING=1")
    assert any(message.startswith("STATUS=") for message in manager.told)


async def test_a_socket_that_was_handed_over_is_served(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = settings(tmp_path / "home", **{"http.listen": f"127.0.0.1:{port}"})
    async with running(config, worker_command=FAKE_WORKER, listeners=[listener]), httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/health/live")).status_code == 200


async def test_a_socket_at_another_address_than_configured_is_refused(tmp_path: Path) -> None:
    """Who may ask is decided by http.listen: a socket open to others must not slip in under it."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        config = settings(tmp_path / "home", **{"http.listen": f"127.0.0.1:{listener.getsockname()[1]}"})
        with pytest.raises(ConfigError, match=r"handed a socket at 127\.0\.0\.2"):
            async with running(config, worker_command=FAKE_WORKER, listeners=[listener]):
                raise AssertionError


async def test_a_reload_reaches_the_parts_and_is_told_from_beginning_to_end(tmp_path: Path, manager: Manager) -> None:
    before = settings(tmp_path / "home")
    after = settings(tmp_path / "home", **{"rag.near": 0.9, "chat.threads": 2, "log.level": "error"})
    reloader = Reloader(before, lambda: after, manager.notifier)
    async with running(before, worker_command=FAKE_WORKER, notifier=manager.notifier, reloader=reloader) as server:
        await manager.hears("READY=1")
        reloader.request()
        await manager.hears("RELOADING=1")
        await manager.hears("READY=1")
        async with httpx.AsyncClient() as client:
            shown = (await client.get(f"http://127.0.0.1:{server.port}/health")).json()
    assert {"restart_needed"} <= {condition["code"] for condition in shown["conditions"]}
    assert reloader.config is after
