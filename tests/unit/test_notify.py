"""What the service manager hears, and the sockets it hands over."""

import asyncio
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from edged.errors import StoreError
from edged.runtime.notify import LONGEST_STATUS_CHARACTERS, Notifier, feed_watchdog, inherited_listeners

PID = 4711


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket and its ``$NOTIFY_SOCKET``."""
    name = f"@edged-test-{os.getpid()}-{tmp_path.name}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:] if name.startswith("@") else name)
        listening.settimeout(5)
        yield listening, name


def test_each_message_is_one_datagram_as_sd_notify_says(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    notifier = Notifier.of({"NOTIFY_SOCKET": address}, PID)
    notifier.ready()
    notifier.status("degraded:\nmqtt_disconnected")
    notifier.alive()
    notifier.stopping()
    told = [listening.recv(4096) for _ in range(4)]
    assert told == [b"READY=1", b"STATUS=degraded: mqtt_disconnected", b"WATCHDOG=1", b"STOPPING=1"]


def test_a_reload_is_told_with_the_time_of_its_beginning(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    Notifier(address).reloading()
    first, second = listening.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def test_a_status_is_one_short_line(manager: tuple[socket.socket, str]) -> None:
    listening, address = manager
    Notifier(address).status("x" * 5000)
    assert len(listening.recv(8192)) == len("STATUS=") + LONGEST_STATUS_CHARACTERS


def test_without_a_manager_or_with_one_that_is_gone_nothing_fails(tmp_path: Path) -> None:
    Notifier.of({}, PID).ready()
    Notifier.of({"NOTIFY_SOCKET": "vsock:2:1"}, PID).ready()
    Notifier(str(tmp_path / "gone")).ready()


def test_without_a_descriptor_left_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor(*_arguments: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", no_descriptor)
    with structlog.testing.capture_logs() as lines:
        Notifier(str(tmp_path / "manager")).alive()
    assert [line["event"] for line in lines] == ["notify_failed"]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(PID)}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_ours_only_when_it_names_this_process(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert Notifier.of({"NOTIFY_SOCKET": "/run/notify", **environment}, PID).watchdog_seconds == seconds


async def test_the_watchdog_is_fed_while_the_stores_answer(tmp_path: Path) -> None:
    """A store that says no starves it; one that answers again feeds it again."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    listening.bind(str(tmp_path / "notify"))
    fed, asked = 0, 0
    enough = asyncio.Event()

    async def answers() -> None:
        nonlocal asked
        asked += 1
        if asked in (2, 3):
            raise StoreError("the disk is gone")
        if asked == 5:
            enough.set()

    with listening:
        feeding = asyncio.create_task(feed_watchdog(Notifier(str(tmp_path / "notify"), watchdog_seconds=0.01), answers))
        await asyncio.wait_for(enough.wait(), 10)
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        while True:
            try:
                assert listening.recv(64) == b"WATCHDOG=1"
            except BlockingIOError:
                break
            fed += 1
    assert fed in (2, 3)  # the fifth answer may have been cut off before it was told


async def test_nobody_is_fed_where_nobody_watches() -> None:
    async def answers() -> None:
        raise AssertionError

    await feed_watchdog(Notifier(), answers)


HEIR = """
import os
from edged.runtime.notify import inherited_listeners
found = inherited_listeners({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}, os.getpid())
print(found[0].getsockname()[1], os.get_inheritable(3))
"""


def test_a_socket_that_the_manager_opened_is_taken_over_and_kept_from_children() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = subprocess.run(
            ["bash", "-c", f"exec {sys.executable} -c '{HEIR}' 3<&{listening.fileno()}"],
            pass_fds=[listening.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(listening.getsockname()[1]), "False"]


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(PID)}, {"LISTEN_PID": str(PID), "LISTEN_FDS": "x"}],
)
def test_sockets_meant_for_others_are_left_alone(environment: dict[str, str]) -> None:
    assert inherited_listeners(environment, PID) == []
