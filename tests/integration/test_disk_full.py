"""A disk that is really full: nothing acknowledged is lost, the error is named, and room is enough to go on."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.broker import Mosquitto
from tests.daemon_process import DaemonProcess
from tests.integration.test_kill import QUICK, add_manual, outcomes
from tests.mqtt_client import MqttClient

pytestmark = pytest.mark.broker

DISK_BYTES = 2 << 20
BALLAST_BYTES = 1 << 20
MOST_EVENTS = 400
QUESTION = "How much oil does pump P7 hold? " + "It is the old one behind the boiler. " * 40


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of which half is taken by a file named ballast."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "home"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (disk / "ballast").write_bytes(bytes(BALLAST_BYTES))
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Take what is left."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        try:
            while ballast.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


class Watch:
    """A sensor that also reads the daemon's retained status; its answers are kept apart."""

    def __init__(self, sensor: MqttClient) -> None:
        self._sensor = sensor
        self.published: list[str] = []
        self.answered: dict[str, set[str]] = {}
        self.deliveries = 0
        self.is_failing = False

    def ask(self) -> None:
        name = f"e{len(self.published)}"
        self.published.append(name)
        self._sensor.publish("edged/query", {"id": name, "query": QUESTION})

    def next(self) -> None:
        topic, body = self._sensor.next()
        if topic == "edged/status":
            self.is_failing = "store_failing" in body.get("conditions", [])
        else:
            self.deliveries += 1
            self.answered.setdefault(body["id"], set()).add(body["answer_id"])

    def until_all_answered(self) -> None:
        while len(self.answered) < len(self.published):
            self.next()


def store_failing(daemon: DaemonProcess) -> dict[str, Any] | None:
    """The condition as /health shows it; where a smaller write still fits, it comes and goes."""
    body = httpx.get(f"http://127.0.0.1:{daemon.port}/health", trust_env=False).json()
    return next((held for held in body["conditions"] if held["code"] == "store_failing"), None)


def ask_until_full(watch: Watch, disk: Path) -> None:
    while not watch.is_failing:
        assert len(watch.published) < MOST_EVENTS
        watch.ask()
        watch.next()
    fill(disk)
    watch.ask()  # beyond the last byte: the broker keeps it


@pytest.mark.parametrize("killed", [False, True], ids=["and it keeps running", "and it is killed and started again"])
def test_on_a_full_disk_events_wait_and_are_answered_once_there_is_room(
    small_disk: Path, mosquitto: Mosquitto, *, killed: bool
) -> None:
    daemon = DaemonProcess(small_disk, {**QUICK, "mqtt.url": mosquitto.url})
    daemon.start()
    try:
        add_manual(daemon)
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#", "edged/status") as sensor:
            watch = Watch(sensor)
            ask_until_full(watch, small_disk)
            if killed:
                daemon.kill()
                daemon.start()
            while (failing := store_failing(daemon)) is None:
                pass
            (small_disk / "ballast").unlink()
            watch.until_all_answered()
            while store_failing(daemon) is not None:
                pass
    finally:
        daemon.stop()
    assert failing["severity"] == "failing"
    assert f"no space left for {small_disk}/events.db" in failing["text"]
    assert outcomes(small_disk) == dict.fromkeys(watch.published, 1)
    assert all(len(identities) == 1 for identities in watch.answered.values())
    assert watch.deliveries <= 3 * len(watch.published)  # at least once, but no flood


def test_a_document_that_does_not_fit_is_refused_by_name_and_fits_once_there_is_room(small_disk: Path) -> None:
    daemon = DaemonProcess(small_disk, {"mqtt.enabled": False})
    daemon.start()
    try:
        fill(small_disk)
        documents = f"http://127.0.0.1:{daemon.port}/v1/documents"
        body = {"id": "long", "text": "The relief valve of pump P7 opens at 12 bar.\n\n" * 500}
        refused = httpx.post(documents, json=body, trust_env=False)
        (small_disk / "ballast").unlink()
        accepted = httpx.post(documents, json=body, trust_env=False)
    finally:
        daemon.stop()
    assert (refused.status_code, refused.json()["code"]) == (507, "disk_full")
    assert "free space" in refused.json()["hint"]
    assert accepted.status_code == 201
