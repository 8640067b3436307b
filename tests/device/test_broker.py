"""``--broker local``: the device brings its broker along, from the bundle, and serves sensors of its network."""

import json
import queue
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.device.bundle import make_bundle
from tests.device.conftest import Boot
from tests.device.installed import (
    ANSWER_SECONDS,
    BROKER_PORT,
    QUESTION,
    READY_SECONDS,
    install,
    wait_until,
    wait_until_ready,
)
from tests.mqtt_client import MqttClient

pytestmark = pytest.mark.timeout(5400)

CONNACK_SECONDS = 120.0
ANSWER_TOPIC = "edged/answer/sensor/1"
OTHERS_TOPIC = "edged/answer/other/1"


@pytest.mark.takes(amd64=8, arm64=14)
def test_sensors_of_the_network_log_in_at_the_devices_own_broker_and_are_answered(boot: Boot, share: Path) -> None:
    board = boot(None)
    bundle = make_bundle(board.image.architecture, share / "with-broker", packages=("mosquitto",))
    told = install(board, "--bundle", f"/mnt/share/{bundle.name}", "--broker", "local")
    assert told.returncode == 0, told.stdout + told.stderr
    wait_until_ready(board)
    wait_until(board, 'edged status | grep -q "mqtt: *connected"')
    board.run("edged docs add /mnt/share/manual.md", timeout_seconds=READY_SECONDS)

    password, monitors = board.run("cat /etc/edged/sensor-password /etc/edged/monitor-password").split()
    port = board.port(BROKER_PORT)
    assert refusal(port, None) == "Not authorized"
    assert refusal(port, ("sensor", "guessed")) == "Not authorized"
    with (
        MqttClient(port, "pump", ANSWER_TOPIC, OTHERS_TOPIC, login=("sensor", password)) as sensor,
        MqttClient(port, "desk", OTHERS_TOPIC, login=("monitor", monitors)) as monitor,
    ):
        sensor.publish("edged/query", {"id": "o1", "query": QUESTION}, response_topic=OTHERS_TOPIC)
        sensor.publish("edged/query", {"id": "s1", "query": QUESTION}, response_topic=ANSWER_TOPIC)
        message = sensor.messages.get(timeout=ANSWER_SECONDS)
        assert monitor.messages.get(timeout=ANSWER_SECONDS).topic == OTHERS_TOPIC
    assert message.topic == ANSWER_TOPIC  # the other one is not this sensor's to read
    assert "dry" in json.dumps(json.loads(message.payload))
    assert board.run("stat -c '%a %U' /etc/edged/sensor-password /etc/edged/mqtt-password").split("\n")[:2] == [
        "600 root",
        "640 root",
    ]
    board.discard()


def refusal(port: int, login: tuple[str, str] | None) -> str:
    """What the broker says to this login."""
    said: queue.Queue[str] = queue.Queue()
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="stranger", protocol=MQTTProtocolVersion.MQTTv5)
    if login is not None:
        client.username_pw_set(*login)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: said.put(str(reason))
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        return said.get(timeout=CONNACK_SECONDS)
    finally:
        client.disconnect()
        client.loop_stop()
