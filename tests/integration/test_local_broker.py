"""``--broker local``: who may read and write what, asked of a mosquitto with the files that the installer writes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker import Mosquitto
from tests.fake_system import System
from tests.mqtt_client import MqttClient
from tests.ports import find_free_port

ANSWER = "edged/answer/sensor/1"
NO_RESPONSE_TOPIC = "edged/answer/0193e0c4"


@pytest.fixture
def system(tmp_path: Path) -> System:
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    system = System(tmp_path / "system")
    (system.root / "etc/mosquitto/conf.d").mkdir(parents=True)
    system.run("install_broker")
    return system


@pytest.fixture
def broker(system: System, tmp_path: Path) -> Iterator[Mosquitto]:
    lines = (system.root / "etc/mosquitto/conf.d/edged.conf").read_text().splitlines()
    options = [line for line in lines if line.startswith(("allow_anonymous", "password_file", "acl_file"))]
    assert len(options) == 3
    broker = Mosquitto(tmp_path, find_free_port(), "\n".join(options))
    broker.start()
    yield broker
    broker.stop()


def login(system: System, name: str, file: str) -> tuple[str, str]:
    return name, (system.config.parent / file).read_text().strip()


def test_the_monitor_reads_all_answers_and_a_sensor_its_own(system: System, broker: Mosquitto) -> None:
    with (
        MqttClient(broker.port, "d", login=login(system, "edged", "mqtt-password")) as daemon,
        MqttClient(broker.port, "s", "edged/answer/#", login=login(system, "sensor", "sensor-password")) as sensor,
        MqttClient(broker.port, "m", "edged/#", login=login(system, "monitor", "monitor-password")) as monitor,
    ):
        daemon.publish(NO_RESPONSE_TOPIC, "for the monitor")
        daemon.publish(ANSWER, "for the sensor")
        assert [monitor.next_raw().topic for _ in range(2)] == [NO_RESPONSE_TOPIC, ANSWER]
        assert sensor.next_raw().payload == b"for the sensor"  # the first one is not this sensor's to read


def test_a_second_run_keeps_passwords_and_changed_rules_and_adds_what_is_missing(system: System) -> None:
    rules = system.root / "etc/mosquitto/edged.acl"
    passwords = system.root / "etc/mosquitto/edged.passwd"
    rules.write_text(f"{rules.read_text()}pattern read plant/#\n")
    before = passwords.read_text().splitlines()
    passwords.write_text("\n".join(line for line in before if not line.startswith("monitor:")) + "\n")
    changed = rules.read_text()
    assert f"kept: {rules}" in system.run("install_broker")
    after = passwords.read_text().splitlines()
    assert rules.read_text() == changed
    assert after[:2] == before[:2]
    assert [line.partition(":")[0] for line in after] == ["edged", "sensor", "monitor"]
    secret = system.config.parent / "sensor-password"
    secret.unlink()
    assert system.attempt("broker_is_whole").returncode == 1
    system.run("install_broker; broker_is_whole")
    renewed = passwords.read_text().splitlines()
    assert secret.read_text().strip()
    assert [line.partition(":")[0] for line in renewed] == ["edged", "monitor", "sensor"]
    assert renewed[-1] != after[1]
    assert "kept" not in system.run(
        f"rm {rules}; if broker_is_whole; then exit 9; fi; install_broker; install_broker; broker_is_whole"
    )
