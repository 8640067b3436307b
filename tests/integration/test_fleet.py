"""Several devices at one broker: each has topics of its own by its name, or shares the work by one subscription."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from edged.daemon import running
from tests.broker import Mosquitto
from tests.daemon_process import FAKE_WORKER, DaemonProcess, configure
from tests.mqtt_client import MqttClient

pytestmark = pytest.mark.broker

OWN_TOPICS = {
    "mqtt.query_topic": "edged/{device}/query",
    "mqtt.answer_prefix": "edged/{device}/answer",
    "mqtt.status_topic": "edged/{device}/status",
    "events.topics": [{"filter": "plant/{device}/pressure", "question": "Is {value} bar too much?"}],
}


def named(device: str, broker: Mosquitto, **overrides: Any) -> dict[str, Any]:
    """What one box of many has of its own; ``overrides`` hold for all of them."""
    return {"mqtt.url": broker.url, "mqtt.client_id": f"edged-{device}", "probe.device": device, **overrides}


@contextlib.asynccontextmanager
async def boxes(folder: Path, broker: Mosquitto, **overrides: Any) -> AsyncIterator[MqttClient]:
    """Two of them, ready; gives a client that hears their answers."""
    async with contextlib.AsyncExitStack() as stack:
        for device in ("pump-1", "pump-2"):
            config = configure(folder / device, named(device, broker, **overrides))
            await stack.enter_async_context(running(config, worker_command=FAKE_WORKER))
            await status(broker, device, "ok")
        yield stack.enter_context(MqttClient(broker.port, "sensor", "edged/answer/#", "edged/+/answer/#"))


async def status(broker: Mosquitto, device: str, wanted: str) -> dict[str, Any]:
    """The retained status of a device, once it is the one wanted."""

    def wait() -> dict[str, Any]:
        with MqttClient(broker.port, f"watch-{device}", f"edged/{device}/status") as watcher:
            while (body := watcher.next()[1])["status"] != wanted:
                pass
            return dict(body)

    return await asyncio.to_thread(wait)


async def test_each_of_two_boxes_of_one_configuration_is_asked_and_answers_and_tells_of_itself_alone(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    async with boxes(tmp_path, mosquitto, **OWN_TOPICS) as sensor:
        await asyncio.to_thread(sensor.publish, "edged/pump-2/query", {"query": "Why?", "id": "q"})
        asked, _ = await asyncio.to_thread(sensor.next)
        await asyncio.to_thread(sensor.publish, "plant/pump-1/pressure", "12")
        measured, _ = await asyncio.to_thread(sensor.next)
        assert sensor.messages.empty()
    assert asked == "edged/pump-2/answer/q"
    assert measured.startswith("edged/pump-1/answer/")
    for device in ("pump-1", "pump-2"):
        assert await status(mosquitto, device, "offline") == {"status": "offline", "device": device}


async def test_one_of_several_answers_where_they_share_a_subscription(tmp_path: Path, mosquitto: Mosquitto) -> None:
    shared = {
        "mqtt.query_topic": "$share/boxes/ask",
        "mqtt.status_topic": "edged/{device}/status",
        "events.topics": [{"filter": "$share/boxes/plant/+", "question": "Is {value} of {topic[1]} too much?"}],
    }
    questions = [f"q{number}" for number in range(4)]
    async with boxes(tmp_path, mosquitto, **shared) as sensor:
        for question in questions:
            await asyncio.to_thread(sensor.publish, "ask", {"query": "Why?", "id": question})
        heard = [(await asyncio.to_thread(sensor.next))[0] for _ in questions]
        await asyncio.to_thread(sensor.publish, "plant/p7", "12")
        await asyncio.to_thread(sensor.next)
        assert sensor.messages.empty()
    assert sorted(heard) == [f"edged/answer/{question}" for question in questions]


async def test_the_last_will_names_the_device(tmp_path: Path, mosquitto: Mosquitto) -> None:
    process = DaemonProcess(tmp_path / "home", named("pump-1", mosquitto, **OWN_TOPICS))
    await asyncio.to_thread(process.start)
    assert (await status(mosquitto, "pump-1", "ok"))["device"] == "pump-1"
    await asyncio.to_thread(process.kill)
    assert await status(mosquitto, "pump-1", "offline") == {"status": "offline", "device": "pump-1"}
