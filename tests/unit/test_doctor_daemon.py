"""How the doctor finds the running daemon: without starting one, and without taking it for another program."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edged.config import Config, load
from edged.doctor import daemon
from edged.doctor.device import Daemon, Device, Reach
from edged.runtime.home import hold_home


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def config(tmp_path: Path, listener: socket.socket) -> Config:
    listen = f"127.0.0.1:{listener.getsockname()[1]}"
    return load(None, {}, {"home": str(tmp_path / "home"), "http.listen": listen})


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(daemon, "BUSY_SECONDS", 0.2)


def device(config: Config, root: Path, **units: str) -> Device:
    """``device(config, root, service="MainPID=0")``: a device where systemd says this of edged's units."""
    (root / "run/systemd/system").mkdir(parents=True)

    def run(command: Sequence[str], seconds: float = 1.0) -> str | None:
        del seconds
        return units.get(command[2].removeprefix("edged."))

    return Device(config, Daemon(None), root, run)


@contextlib.contextmanager
def answering(listener: socket.socket, status: str, body: object) -> Iterator[None]:
    """A server that answers one request like that."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            content = json.dumps(body).encode()
            connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    thread.join()


def asked(listener: socket.socket, within_seconds: float) -> bool:
    """Whether somebody connects."""
    listener.settimeout(within_seconds)
    with contextlib.suppress(TimeoutError):
        listener.accept()[0].close()
        return True
    return False


def test_a_stopped_daemon_is_not_started_by_the_question_whether_it_runs(
    config: Config, listener: socket.socket, tmp_path: Path
) -> None:
    held = f"SubState=listening\nListen=[::1]:1 (Stream)\nListen={config.http.listen} (Stream)\n"
    found = daemon.find_daemon(device(config, tmp_path, service="MainPID=0\n", socket=held))
    assert (found.reach, asked(listener, 0.3)) == (Reach.WAITS, False)


@pytest.mark.parametrize(
    ("service", "state", "port"),
    [("MainPID=7", "listening", None), ("MainPID=0", "running", None), ("MainPID=0", "listening", 1)],
)
def test_a_daemon_that_runs_or_a_socket_elsewhere_is_asked(
    config: Config, listener: socket.socket, tmp_path: Path, service: str, state: str, port: int | None
) -> None:
    listen = config.http.listen if port is None else f"127.0.0.1:{port}"
    daemon.find_daemon(
        device(config, tmp_path, service=service, socket=f"SubState={state}\nListen={listen} (Stream)\n")
    )
    assert asked(listener, 10.0)


def test_an_edged_that_is_too_busy_to_answer_is_known_by_the_home_it_holds(config: Config, tmp_path: Path) -> None:
    with hold_home(config):
        found = daemon.find_daemon(device(config, tmp_path))
    assert (found.status, found.reach) == (None, Reach.RUNS)
    assert daemon.find_daemon(device(config, tmp_path / "later")).reach is Reach.SILENT


def test_an_edged_that_is_too_busy_to_answer_is_known_by_its_units_process(config: Config, tmp_path: Path) -> None:
    assert daemon.find_daemon(device(config, tmp_path, service="MainPID=4711\n")).reach is Reach.RUNS


def test_an_edged_that_runs_and_does_not_serve_yet_is_known_too(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "ANSWER_SECONDS", 10.0)
    config = load(None, {}, {"home": str(tmp_path / "home"), "http.listen": f"127.0.0.1:{free_port}"})
    assert daemon.find_daemon(device(config, tmp_path)).reach is Reach.NOBODY
    with hold_home(config):
        assert daemon.find_daemon(device(config, tmp_path / "again")).reach is Reach.RUNS


def test_an_edged_that_runs_has_longer_to_answer(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Daemon(None, "this needs the API key", Reach.CLOSED)

    def answer(_config: Config) -> Daemon:
        time.sleep(0.3)
        return late

    monkeypatch.setattr(daemon, "BUSY_SECONDS", 10.0)
    monkeypatch.setattr(daemon, "ask_daemon", answer)
    with hold_home(config):
        assert daemon.find_daemon(device(config, tmp_path)) is late


def test_an_edged_that_wants_the_api_key_is_no_other_program(
    config: Config, listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "ANSWER_SECONDS", 10.0)
    body = {"code": "unauthorized", "detail": "this needs the API key", "hint": "send it", "retryable": False}
    with answering(listener, "401 Unauthorized", body):
        found = daemon.find_daemon(device(config, tmp_path))
    assert (found.reach, found.problem) == (Reach.CLOSED, "this needs the API key")


def test_another_program_stays_one_while_edged_runs_without_its_port(
    config: Config, listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "ANSWER_SECONDS", 10.0)
    with hold_home(config), answering(listener, "200 OK", "hi"):
        assert daemon.find_daemon(device(config, tmp_path)).reach is Reach.STRANGER


def test_a_home_is_only_looked_at(config: Config, tmp_path: Path) -> None:
    daemon.find_daemon(device(config, tmp_path / "root"))
    assert not config.home.exists()
