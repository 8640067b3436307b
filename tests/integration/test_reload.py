"""A whole daemon and a broker: topics come and go by a reload, also those that the broker's session still holds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edged.config import Config
from edged.daemon import running
from edged.reload import Reloader
from edged.runtime.notify import Notifier
from tests.broker import Mosquitto
from tests.daemon_process import FAKE_WORKER, configure
from tests.mqtt_client import MqttClient

pytestmark = pytest.mark.broker

PRESSURE = {"filter": "plant/pressure", "question": "Is {value} bar too much?"}
HEAT = {"filter": "plant/heat", "question": "Is {value} °C too much?"}


class Box:
    """A daemon that runs, and what its configuration file says by now."""

    def __init__(self, home: Path, broker: Mosquitto) -> None:
        self._home = home
        self._broker = broker
        self.config = self._configured({})
        self.ended = asyncio.Event()
        self.reloader: Reloader | None = None
        self.http = httpx.AsyncClient(trust_env=False)

    def _configured(self, changes: dict[str, Any]) -> Config:
        quick = {"mqtt.reconnect_min_seconds": 0.05, "mqtt.reconnect_max_seconds": 0.2}
        return configure(self._home, {"mqtt.url": self._broker.url, **quick, **changes})

    def ready(self) -> None:
        self.ended.set()

    @contextlib.asynccontextmanager
    async def runs(self, **changes: Any) -> AsyncIterator["Box"]:
        self.config = self._configured({name.replace("__", "."): value for name, value in changes.items()})
        notifier = Notifier()
        notifier.ready = self.ready  # type: ignore[method-assign]
        self.reloader = Reloader(self.config, lambda: self.config, notifier)
        async with (
            running(self.config, worker_command=FAKE_WORKER, reloader=self.reloader) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as self.http,
        ):
            await asyncio.to_thread(self._hears)
            yield self

    def _hears(self) -> None:
        """Wait for the retained status, which it publishes after it has subscribed."""
        with MqttClient(self._broker.port, "watch", "edged/status") as watcher:
            while watcher.next()[1]["status"] != "ok":
                pass

    async def reload(self, **changes: Any) -> None:
        assert self.reloader is not None
        self.config = self._configured({name.replace("__", "."): value for name, value in changes.items()})
        self.ended.clear()
        self.reloader.request()
        await asyncio.wait_for(self.ended.wait(), 30)

    async def health(self) -> dict[str, Any]:
        return dict((await self.http.get("/health")).json())

    async def connected(self, *, wanted: bool) -> None:
        while (await self.health())["mqtt"]["connected"] is not wanted:
            pass


@pytest.fixture
def box(tmp_path: Path, mosquitto: Mosquitto) -> Box:
    return Box(tmp_path / "home", mosquitto)


async def publish(sensor: MqttClient, *topics: str) -> None:
    for topic in topics:
        await asyncio.to_thread(sensor.publish, topic, "12")


async def is_deaf_to(sensor: MqttClient, topic: str) -> bool:
    """Whether a value on the topic is answered no more, where a question after it is."""
    await publish(sensor, topic)
    await asyncio.to_thread(sensor.publish, "edged/query", {"query": "Why?", "id": "after"})
    return (await asyncio.to_thread(sensor.next))[0] == "edged/answer/after" and sensor.messages.empty()


async def test_topics_come_and_go_while_connected(box: Box, mosquitto: Mosquitto) -> None:
    with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
        async with box.runs(events__topics=[PRESSURE]):
            await box.reload(events__topics=[HEAT])
            await asyncio.to_thread(mosquitto.until_logged, "plant/heat (QoS", 1)
            await publish(sensor, "plant/heat")
            await asyncio.to_thread(sensor.next)
            assert await is_deaf_to(sensor, "plant/pressure")


async def test_a_topic_that_went_while_the_broker_was_away_is_left_in_its_session_too(
    box: Box, mosquitto: Mosquitto
) -> None:
    async with box.runs(events__topics=[PRESSURE]):
        await asyncio.to_thread(mosquitto.stop)
        await box.connected(wanted=False)
        await box.reload()
        await asyncio.to_thread(mosquitto.start)
        await box.connected(wanted=True)
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            assert await is_deaf_to(sensor, "plant/pressure")
    assert any("UNSUBSCRIBE from edged" in line for line in mosquitto.log)
    assert not any("Sending PUBLISH to edged " in line and "plant/pressure" in line for line in mosquitto.log)


async def test_a_value_that_the_broker_kept_for_a_topic_that_went_meanwhile_is_no_question(
    box: Box, mosquitto: Mosquitto
) -> None:
    async with box.runs(events__topics=[PRESSURE]):
        pass
    with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
        await publish(sensor, "plant/pressure")
        async with box.runs():
            assert await is_deaf_to(sensor, "plant/pressure")


async def test_a_value_that_was_accepted_before_its_topic_went_is_refused_and_not_asked_as_a_question(
    box: Box, mosquitto: Mosquitto
) -> None:
    slow = {**PRESSURE, "question": "Is {value} bar too much? pause=60"}
    with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
        async with box.runs(events__topics=[slow]):
            await publish(sensor, "plant/pressure")
            while not (await box.health())["events"]["open"]:
                pass
        async with box.runs():
            _, body = await asyncio.to_thread(sensor.next)
    assert "nothing asks about plant/pressure any more" in body["error"]["message"]


async def test_less_to_keep_is_less_kept_at_once(box: Box, mosquitto: Mosquitto) -> None:
    with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
        async with box.runs():
            await asyncio.to_thread(sensor.publish, "edged/query", "Why?")
            await asyncio.to_thread(sensor.next)
            while (await box.health())["events"]["closed"] != 1 or (await box.health())["events"]["unpublished"]:
                pass
            await box.reload(events__keep_bytes=0)
            while (await box.health())["events"]["closed"]:
                pass
