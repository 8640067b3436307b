"""`edged doctor` as a program, beside real brokers and a real daemon."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edged.config import Config, load
from edged.doctor import broker, kernel, models
from edged.doctor.checks import CHECKS
from edged.doctor.device import Daemon, Device, run_command
from edged.doctor.finding import Finding, Level
from tests.broker import Mosquitto, refusing
from tests.daemon_process import DaemonProcess, configure

NOBODY = Daemon(None, "no daemon answers")


def doctor(home: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit status and findings by check of the program itself."""
    done = subprocess.run(
        [sys.executable, "-m", "edged.cli", "doctor", "--json"],
        env={"PATH": os.environ["PATH"], "EDGED_HOME": str(home), "EDGED_CACHE": str(home / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    body = json.loads(done.stdout)
    assert sum(body["counts"].values()) == len(body["findings"]) == len(CHECKS)
    return done.returncode, {line["check"]: line for line in body["findings"]}


def ask_broker(url: str, topics: Sequence[dict[str, str]] = (), **settings: Any) -> Finding:
    overrides = {f"mqtt.{name}": value for name, value in {"url": url, **settings}.items()}
    config = load(None, {}, {**overrides, "events.topics": list(topics)})
    return broker.judge_broker(broker.read_broker(Device(config, NOBODY)))


def test_a_device_without_broker_fails_and_nothing_is_made_in_its_home(tmp_path: Path, free_port: int) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    status, found = doctor(home, EDGED_MQTT__URL=f"mqtt://127.0.0.1:{free_port}", EDGED_HTTP__LISTEN="127.0.0.1:1")
    assert status == 1
    assert (found["broker"]["level"], "Connection refused" in found["broker"]["what"]) == ("fail", True)
    assert found["models"]["level"] == "warn"
    assert found["sqlite"]["level"] == "ok"
    assert list(home.iterdir()) == []


def test_beside_a_running_daemon_its_port_is_known_and_its_session_stays(tmp_path: Path, mosquitto: Mosquitto) -> None:
    home = tmp_path / "home"
    process = DaemonProcess(home, {"mqtt.url": mosquitto.url})
    process.start()
    try:
        _, found = doctor(
            home,
            EDGED_MQTT__URL=mosquitto.url,
            EDGED_HTTP__LISTEN=f"127.0.0.1:{process.port}",
            EDGED_CHAT__PATH=str(home / "chat.gguf"),
            EDGED_EMBED__PATH=str(home / "embed.gguf"),
        )
    finally:
        process.stop()
    assert (found["port"]["level"], "serves" in found["port"]["what"]) == ("ok", True)
    assert found["broker"]["level"] == "ok"
    assert found["models"]["level"] == "ok"
    assert found["memory"]["level"] in ("ok", "warn", "fail")
    assert not any("already connected" in line for line in mosquitto.log)


def test_another_program_on_the_port_fails_whether_it_answers_or_not(tmp_path: Path) -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listen = f"127.0.0.1:{listener.getsockname()[1]}"
        other = threading.Thread(target=answer, args=(listener,))
        other.start()
        status, found = doctor(tmp_path, EDGED_HTTP__LISTEN=listen, EDGED_MQTT__ENABLED="false")
        other.join()
        assert (status, found["port"]["level"]) == (1, "fail")
        assert "is no edged" in found["port"]["what"]
        status, found = doctor(tmp_path, EDGED_HTTP__LISTEN=listen, EDGED_MQTT__ENABLED="false")
        assert (status, found["port"]["level"]) == (1, "fail")
        assert "does not answer" in found["port"]["what"]


def session_present(mosquitto: Mosquitto, client_id: str) -> bool:
    present: list[bool] = []
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
    client.on_connect = lambda _client, _data, flags, _code, _given: present.append(flags.session_present)
    asked = Properties(PacketTypes.CONNECT)
    asked.SessionExpiryInterval = 100
    client.connect("127.0.0.1", mosquitto.port, clean_start=False, properties=asked)
    while not present:
        client.loop(0.1)
    client.disconnect()
    client.loop(0.1)
    return present[0]


def test_an_open_broker_is_right_and_keeps_no_session_of_the_doctors(mosquitto: Mosquitto) -> None:
    found = ask_broker(mosquitto.url, client_id="d")
    assert (found.level, "7.0 days" in found.what) == (Level.OK, True)
    assert session_present(mosquitto, "d-doctor") is False
    assert session_present(mosquitto, "d-doctor") is True  # as it would be, had the doctor left one


def test_an_interrupted_doctor_leaves_no_session_that_questions_could_queue_up_in(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(client: paho.Client, _version: str) -> None:
        connection = client.socket()
        assert connection is not None
        connection.close()

    monkeypatch.setattr(broker, "_leave", cut_off)
    assert ask_broker(mosquitto.url, client_id="d").level is Level.OK
    mosquitto.until_logged("Client d-doctor", times=2)  # their ends
    assert session_present(mosquitto, "d-doctor") is False


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_no_question_of_the_fleet_is_dealt_to_the_doctor(mosquitto: Mosquitto, protocol: str) -> None:
    topics = [{"filter": "$share/boxes/plant/+", "question": "?"}]
    found = ask_broker(mosquitto.url, topics, client_id="d", query_topic="$share/boxes/ask", protocol=protocol)
    assert found.level is Level.OK
    mosquitto.until_logged("plant/+ (QoS 0)", times=1)
    asked = [line.split()[-3] for line in mosquitto.log if line.endswith("(QoS 0)")]
    assert asked == ["ask", "plant/+"]


@contextlib.contextmanager
def broker_that(subscribed: bytes | None, *, connected: bytes = b"\x20\x03\x00\x00\x00") -> Iterator[str]:
    """The URL of a broker that answers CONNECT like that, and SUBSCRIBE, or hangs up on it (None)."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    answer(connection)

    def answer(connection: socket.socket) -> None:
        while packet := connection.recv(4096):
            if packet[0] == 0x10:
                connection.sendall(connected)
            elif packet[0] == 0x82:
                if subscribed is None:
                    return
                connection.sendall(subscribed)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("subscribed", [None, b""])
def test_a_broker_that_hangs_up_on_a_subscription_or_does_not_answer_it_refuses_it(
    monkeypatch: pytest.MonkeyPatch, subscribed: bytes | None
) -> None:
    monkeypatch.setattr(broker, "ANSWER_SECONDS", 0.5)
    with broker_that(subscribed) as url:
        found = ask_broker(url, query_topic="ask")
    assert found.level is Level.FAIL
    assert "refuses edged the topics ask (no answer)" in found.what


def test_a_broker_without_shared_subscriptions_is_told_from_their_filters() -> None:
    says_so = b"\x20\x05\x00\x00\x02\x2a\x00"  # MQTT 5.0, section 3.2.2.3.13
    with broker_that(b"", connected=says_so) as url:
        found = ask_broker(url, query_topic="$share/boxes/ask")
    assert found.level is Level.FAIL
    assert "$share/boxes/ask (no shared subscriptions)" in found.what


@pytest.mark.parametrize("is_silent", [True, False])
def test_a_broker_whose_name_nobody_resolves_fails_in_time(monkeypatch: pytest.MonkeyPatch, is_silent: bool) -> None:
    for_ever = threading.Event()

    def resolve(*_: Any, **__: Any) -> Any:
        if is_silent:
            for_ever.wait()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(broker, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = ask_broker("mqtt://broker.example")
    for_ever.set()
    assert found.level is Level.FAIL
    assert "the name broker.example cannot be resolved" in found.what
    assert ("no answer within" if is_silent else "not known") in found.what


@pytest.fixture
def guarded(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> Mosquitto:
    """A broker with one user, edged, whose password is right."""
    file = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(file), "edged", "right"], check=True, capture_output=True)
    file.chmod(0o644)
    return make_mosquitto(f"allow_anonymous false\npassword_file {file}")


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
@pytest.mark.parametrize("password", ["right", "wrong", None])
def test_credentials_are_tried_and_wrong_or_missing_ones_are_said(
    guarded: Mosquitto, tmp_path: Path, password: str | None, protocol: str
) -> None:
    settings: dict[str, Any] = {"protocol": protocol}
    if password is not None:
        file = tmp_path / "password"
        file.write_text(password + "\n")
        settings |= {"username": "edged", "password_file": str(file)}
    found = ask_broker(guarded.url, **settings)
    assert found.level is (Level.OK if password == "right" else Level.FAIL)
    expected = {"right": "MQTT", "wrong": "does not accept the user 'edged'", None: "without a user name"}
    assert expected[password] in found.what


def test_a_password_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    found = ask_broker("mqtt://127.0.0.1:1", username="edged", password_file=str(missing))
    assert found.level is Level.FAIL
    assert f"mqtt.password_file {missing} cannot be read: No such file" in found.what


def test_the_limits_that_a_broker_announces_are_compared_with_the_settings(
    make_mosquitto: Callable[..., Mosquitto],
) -> None:
    small = make_mosquitto("allow_anonymous true\nmax_packet_size 2000\nretain_available false")
    found = ask_broker(small.url)
    assert found.level is Level.WARN
    assert "2000 bytes" in found.what
    assert "retained" in ask_broker(small.url, max_payload_bytes=1000).what


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_topic_that_the_broker_refuses_is_named_with_the_user_to_allow(
    make_mosquitto: Callable[..., Mosquitto], tmp_path: Path, protocol: str
) -> None:
    refused = make_mosquitto(refusing(tmp_path, "plant/#"))
    topics = [{"filter": name, "question": "?"} for name in ("plant/+/heat", "other/heat")]
    found = ask_broker(refused.url, topics, protocol=protocol)
    assert found.level is Level.FAIL
    assert "refuses edged the topics plant/+/heat (" in found.what
    assert "other" not in found.what
    assert "anonymous clients" in found.fix


def test_a_server_that_takes_connections_and_says_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = ask_broker(f"mqtt://127.0.0.1:{listener.getsockname()[1]}")
    assert found.level is Level.FAIL
    assert "does not answer in MQTT 5 or 3.1.1" in found.what


@pytest.mark.models
def test_a_model_whose_bytes_have_changed_is_found(
    tmp_path: Path, models_home: Path, link_models: Callable[[Path], None]
) -> None:
    home = tmp_path / "home"
    link_models(home)
    config: Config = configure(home, {}, fake=False)
    device = Device(config, NOBODY)
    assert models.judge_checksums(models.read_checksums(device)).level is Level.OK
    assert models.judge_memory(models.read_memory(device)).level is not Level.SKIP
    file = next(file for file in (home / "models").glob("*.gguf") if "MiniLM" in file.name or "minilm" in file.name)
    content = bytearray(file.read_bytes())
    file.unlink()  # it is a link to the file of all tests
    content[-1] ^= 1
    file.write_bytes(content)
    found = models.judge_checksums(models.read_checksums(device))
    assert (found.level, found.fix) == (Level.FAIL, f"edged models pull {config.embed.model}")


def test_this_machines_own_build_loads_in_a_child(tmp_path: Path) -> None:
    found = models.read_build(Device(configure(tmp_path, {}), NOBODY))
    assert found.features
    assert "LLAMAFILE" in found.features or "OPENMP" in found.features


def test_the_kernel_says_whether_its_clock_is_synchronised(tmp_path: Path) -> None:
    facts = kernel.read_clock(Device(configure(tmp_path, {}), NOBODY, root=tmp_path))
    assert facts.is_synchronised in (True, False)


def test_a_command_that_is_missing_or_fails_says_nothing() -> None:
    assert run_command(["no-such-command"]) is None
    assert run_command(["false"]) is None
    assert run_command(["echo", "text"]) == "text\n"


def test_a_command_that_does_not_end_is_no_missing_one() -> None:
    with pytest.raises(TimeoutError, match="sleep does not end within 0 s"):
        run_command(["sleep", "60"], 0.1)
