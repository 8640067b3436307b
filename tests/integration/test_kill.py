"""What edged acknowledged survives kill -9: every accepted event ends with exactly one outcome, and it is published."""

import random
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.broker import Mosquitto
from tests.daemon_process import DaemonProcess
from tests.mqtt_client import MqttClient

pytestmark = pytest.mark.broker

MANUAL = "The relief valve of pump P7 opens at 12 bar.\n\nThe pump P7 holds 4 litres of oil."
QUICK = {"mqtt.reconnect_min_seconds": 0.05, "mqtt.reconnect_max_seconds": 0.2, "log.level": "warning"}


class Answers:
    """Everything published under the answer prefix, by event id; a receiver drops repetitions by answer id."""

    def __init__(self, sensor: MqttClient) -> None:
        self._sensor = sensor
        self.by_id: dict[str, set[str]] = {}
        self.deliveries = 0

    def next(self) -> None:
        _, body = self._sensor.next()
        self.deliveries += 1
        self.by_id.setdefault(body["id"], set()).add(body["answer_id"])

    def until(self, count: int) -> None:
        """Take messages until ``count`` events have an answer."""
        while len(self.by_id) < count:
            self.next()


def add_manual(daemon: DaemonProcess) -> None:
    body = {"id": "p7", "text": MANUAL}
    httpx.post(f"http://127.0.0.1:{daemon.port}/v1/documents", json=body, trust_env=False).raise_for_status()


def outcomes(home: Path) -> dict[str, int]:
    """Stored answers by event id, from the file itself."""
    with sqlite3.connect(home / "events.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        open_events = connection.execute("SELECT count(*) FROM events WHERE outcome IS NULL").fetchone()[0]
        assert open_events == 0
        rows = connection.execute("SELECT event_id, count(*) FROM answers GROUP BY event_id").fetchall()
    connection.close()
    return dict(rows)


def publish_all(sensor: MqttClient, payloads: Sequence[str | dict[str, Any]]) -> threading.Thread:
    def work() -> None:
        for payload in payloads:
            sensor.publish("edged/query", payload)

    publisher = threading.Thread(target=work, name="publisher")
    publisher.start()
    return publisher


def kill_at_random(
    daemon: DaemonProcess, sensor: MqttClient, payloads: list[dict[str, Any]], kills: list[int], answers: Answers
) -> None:
    """Publish ``payloads`` while the daemon is killed and started again after the given numbers of answers."""
    publisher = publish_all(sensor, payloads)
    for count in kills:
        answers.until(count)
        daemon.kill()
        daemon.start()
    publisher.join()
    answers.until(len(payloads))


def test_two_hundred_events_survive_kills_at_random_points(tmp_path: Path, mosquitto: Mosquitto) -> None:
    home = tmp_path / "home"
    daemon = DaemonProcess(home, {**QUICK, "mqtt.url": mosquitto.url})
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201 - shown when the test fails
    kills = sorted(random.Random(seed).sample(range(1, 200), 8))
    payloads: list[dict[str, Any]] = [{"id": f"e{n}", "query": "How much oil does pump P7 hold?"} for n in range(200)]
    daemon.start()
    try:
        add_manual(daemon)
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            answers = Answers(sensor)
            kill_at_random(daemon, sensor, payloads, kills, answers)
    finally:
        daemon.stop()
    stored = outcomes(home)
    assert stored == {payload["id"]: 1 for payload in payloads}
    assert all(len(identities) == 1 for identities in answers.by_id.values())
    assert set(answers.by_id) == set(stored)


def test_events_without_an_id_are_neither_lost_nor_doubled_by_a_kill(tmp_path: Path, mosquitto: Mosquitto) -> None:
    home = tmp_path / "home"
    daemon = DaemonProcess(home, {**QUICK, "mqtt.url": mosquitto.url})
    daemon.start()
    try:
        add_manual(daemon)
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            answers = Answers(sensor)
            publisher = publish_all(sensor, ["How much oil does pump P7 hold?"] * 60)
            for count in (7, 21, 40):
                answers.until(count)
                daemon.kill()
                daemon.start()
            publisher.join()
            answers.until(60)
    finally:
        daemon.stop()
    assert len(outcomes(home)) == 60


@pytest.mark.models
@pytest.mark.timeout(600)
def test_the_same_holds_with_real_models(
    tmp_path: Path, mosquitto: Mosquitto, models_home: Path, link_models: Callable[[Path], None]
) -> None:
    home = tmp_path / "home"
    link_models(home)
    daemon = DaemonProcess(home, {**QUICK, "mqtt.url": mosquitto.url, "rag.max_tokens": 8}, fake=False)
    daemon.start()
    payloads: list[dict[str, Any]] = [{"id": f"e{n}", "query": "How much oil does pump P7 hold?"} for n in range(30)]
    try:
        add_manual(daemon)
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            answers = Answers(sensor)
            kill_at_random(daemon, sensor, payloads, [3, 14, 22], answers)
    finally:
        daemon.stop()
    assert outcomes(home) == {payload["id"]: 1 for payload in payloads}


def test_documents_acknowledged_before_a_kill_are_there_after_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    daemon = DaemonProcess(home, {"mqtt.enabled": False})
    acknowledged = []
    for round_number in range(4):
        daemon.start()
        base = f"http://127.0.0.1:{daemon.port}"
        for number in range(5):
            name = f"d{round_number}-{number}"
            answer = httpx.post(f"{base}/v1/documents", json={"id": name, "text": f"{MANUAL} {name}"}, trust_env=False)
            assert answer.status_code == 201
            acknowledged.append(name)
        daemon.kill()
    daemon.start()
    listed = httpx.get(f"http://127.0.0.1:{daemon.port}/v1/documents", trust_env=False).json()["documents"]
    status = daemon.stop()
    assert [document["id"] for document in listed] == sorted(acknowledged)
    assert status == 0
