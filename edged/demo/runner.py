"""Runs the demo: a broker, a daemon of its own, the shipped manuals, three sensor events over MQTT."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from edged.client import Client
from edged.config import Config, load, split_broker_url
from edged.demo import broker
from edged.errors import DaemonUnreachableError, EdgedError
from edged.events.trigger import TopicRule, question_from_value, rule_for
from edged.gateway import wire
from edged.gateway.wire import parse_query

READY_TIMEOUT_SECONDS = 60.0
ANSWER_TIMEOUT_SECONDS = 120.0


class DemoError(EdgedError):
    code = "demo_failed"


class Message(msgspec.Struct, frozen=True):
    """What a sensor of the demo publishes, see ``events.toml``."""

    name: str
    topic: str
    payload: str


class Report(Protocol):
    """Whoever shows the demo's course."""

    def step(self, text: str) -> None:
        """Something is done."""

    def event(self, message: Message, question: str) -> None:
        """A sensor publishes ``message``, which asks ``question``."""

    def delta(self, text: str) -> None:
        """The next piece of the answer."""

    def restarted(self, reason: str) -> None:
        """The pieces so far are void."""

    def answer(self, answer: wire.AnswerBody, round_trip_ms: float) -> None:
        """The finished answer, and the time from publishing to receiving it."""


def run(config: Config, report: Report, *, broker_url: str | None = None) -> None:
    """The whole demo; its daemon lives in ``<home>/demo``. Raises :class:`EdgedError`."""
    script = tomllib.loads((_folder() / "events.toml").read_text(encoding="utf-8"))
    # An id that was used before would be answered from its stored outcome.
    run_id = uuid.uuid4().hex[:6]
    messages = [
        Message(item["name"], item["topic"], item["payload"].replace("-0001", f"-{run_id}"))
        for item in script["messages"]
    ]
    with contextlib.ExitStack() as stack:
        url, name = broker_url, ""
        if url is None:
            url, name = stack.enter_context(broker.running())
            report.step(f"MQTT broker: {name} at {url}")
        else:
            report.step(f"MQTT broker: {url}")
        protocol = "3.1.1" if name == "amqtt" else "auto"  # amqtt stays silent on MQTT 5 until we time out
        demo = _configure(config, url, protocol, script["events"]["topics"])
        started = time.monotonic()
        client = stack.enter_context(_daemon(demo))
        status = client.status()
        report.step(
            f"edged ready in {time.monotonic() - started:.1f} s: {status.chat.model} on {status.chat.threads} threads"
        )
        _ingest(client, report)
        sensor = stack.enter_context(_Sensor.connected(url, demo.mqtt.answer_prefix))
        for message in messages:
            report.event(message, _question(message, script["events"]["topics"]))
            _show_answer(sensor, message, report)


def _folder() -> Traversable:
    return resources.files("edged.demo")


def _configure(config: Config, url: str, protocol: str, topics: list[dict[str, Any]]) -> Config:
    """The user's configuration with a home, a port and sensor topics of the demo's own."""
    home = config.home / "demo"
    home.mkdir(parents=True, exist_ok=True)
    models = home / "models"
    if not models.exists():
        models.unlink(missing_ok=True)
        models.symlink_to(config.models_dir, target_is_directory=True)
    overrides = {
        "home": str(home),
        "cache": str(config.cache),
        "http.listen": f"127.0.0.1:{broker.free_port()}",
        "mqtt.url": url,
        "hardware.cgroups": False,
        "probe.enabled": False,  # its profile would stay retained at somebody's broker
        "mqtt.protocol": protocol,
        "mqtt.client_id": f"edged-demo-{os.getpid()}",
        "mqtt.session_expiry_seconds": 0,
        "mqtt.stream_answers": True,
    }
    tables = [
        "[[events.topics]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in topic.items())
        for topic in topics
    ]
    file = home / "edged.toml"
    file.write_text("\n".join(tables), encoding="utf-8")
    return load(file, {}, overrides)


@contextlib.contextmanager
def _daemon(config: Config) -> Iterator[Client]:
    """``edged serve`` as a child process for the time of the block, ready to be asked."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("EDGED_")},
        "EDGED_HOME": str(config.home),
        "EDGED_CACHE": str(config.cache),
        "EDGED_HTTP__LISTEN": config.http.listen,
        "EDGED_MQTT__URL": config.mqtt.url,
        "EDGED_MQTT__PROTOCOL": config.mqtt.protocol,
        "EDGED_MQTT__CLIENT_ID": config.mqtt.client_id,
        "EDGED_MQTT__SESSION_EXPIRY_SECONDS": str(config.mqtt.session_expiry_seconds),
        "EDGED_MQTT__STREAM_ANSWERS": "true",
    }
    log = config.home / "daemon.log"
    command = [sys.executable, "-m", "edged.cli", "--config", str(config.home / "edged.toml"), "serve"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        with Client.of(config) as client:
            _wait_ready(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_TIMEOUT_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(DaemonUnreachableError):
            status = client.status()
            if status.ready and status.mqtt.connected:
                return
        time.sleep(0.1)  # another process's start is seen only by asking
    raise DemoError(f"the daemon did not become ready; its log is {log}", hint=_last_line(log))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"its last line: {lines[-1]}" if lines else "the log is empty"


def _ingest(client: Client, report: Report) -> None:
    manuals = sorted((file for file in (_folder() / "manuals").iterdir()), key=lambda file: file.name)
    started = time.monotonic()
    for number, manual in enumerate(manuals, start=1):
        ingested = client.add_document(
            wire.DocumentRequest(
                id=manual.name,
                text=manual.read_text(encoding="utf-8"),
                format="markdown" if manual.name.endswith(".md") else "text",
            )
        )
        document = ingested.document
        report.step(f"manual {number}/{len(manuals)} {ingested.outcome}: {document.title} ({document.chunks} passages)")
    report.step(f"{len(manuals)} manuals in {time.monotonic() - started:.1f} s")


def _question(message: Message, topics: list[dict[str, Any]]) -> str:
    """What the daemon will make of a message, by the same functions."""
    payload = message.payload.encode()
    rule = rule_for(message.topic, [TopicRule(**topic) for topic in topics])
    question = question_from_value(rule, message.topic, payload) if rule else parse_query(payload).question()
    return question.text


def _show_answer(sensor: "_Sensor", message: Message, report: Report) -> None:
    started = time.monotonic()
    sensor.publish(message)
    while True:
        topic, body = sensor.next_message()
        if topic.endswith("/stream"):
            if "delta" in body:
                report.delta(body["delta"])
            else:
                report.restarted(body["restarted"])
        elif "error" in body:
            raise DemoError(f"the event failed: {body['error']['message']}", hint=body["error"]["hint"])
        else:
            report.answer(wire.AnswerBody.model_validate(body), (time.monotonic() - started) * 1e3)
            return


class _Sensor:
    """An MQTT 3.1.1 client as a sensor has it: publishes values, listens for answers."""

    def __init__(self, client: paho.Client) -> None:
        self._client = client
        self._messages: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        client.on_message = lambda _client, _data, message: self._messages.put(
            (message.topic, json.loads(message.payload))
        )

    @classmethod
    @contextlib.contextmanager
    def connected(cls, url: str, answer_prefix: str) -> Iterator["_Sensor"]:
        host, port, _ = split_broker_url(url)
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"demo-sensor-{os.getpid()}")
        sensor = cls(client)
        subscribed: queue.Queue[None] = queue.Queue()

        def listen(_client: paho.Client, *_: object) -> None:
            client.subscribe(f"{answer_prefix}/#", qos=1)

        client.on_connect = listen
        client.on_subscribe = lambda *_: subscribed.put(None)
        client.connect(host, port)
        client.loop_start()
        try:
            subscribed.get(timeout=ANSWER_TIMEOUT_SECONDS)
            yield sensor
        finally:
            client.disconnect()
            client.loop_stop()

    def publish(self, message: Message) -> None:
        self._client.publish(message.topic, message.payload, qos=1)

    def next_message(self) -> tuple[str, dict[str, Any]]:
        """The next message on the answer topics, parsed."""
        try:
            return self._messages.get(timeout=ANSWER_TIMEOUT_SECONDS)
        except queue.Empty as error:
            raise DemoError(f"no answer came within {ANSWER_TIMEOUT_SECONDS:.0f} s") from error
