"""A whole daemon and what it tells of its workers: over HTTP, MQTT, a Unix socket and Prometheus."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edged.client import server_sent_events
from edged.daemon import running
from edged.probe.profile import Profile, from_json, from_msgpack
from edged.probe.sample import Source, Step
from tests.broker import Mosquitto
from tests.daemon_process import FAKE_WORKER, configure
from tests.fake_probe import BusyProbe
from tests.mqtt_client import MqttClient

OFFLINE = {"mqtt.enabled": False}
MANUAL = "The relief valve of pump P7 opens at 12 bar."


@contextlib.asynccontextmanager
async def daemon(home: Path, **overrides: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A daemon that looks for its probe in ``home``."""
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    probe = {"probe.enabled": True, "probe.socket": str(home / "probe.sock"), "probe.device": "pump-house"}
    config = configure(home, {**OFFLINE, **probe, **names})
    async with (
        running(config, worker_command=FAKE_WORKER) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=60) as http,
    ):
        yield http


@pytest.fixture
async def probe(tmp_path: Path) -> AsyncIterator[BusyProbe]:
    (tmp_path / "home").mkdir()
    made = BusyProbe(tmp_path / "home" / "probe.sock")
    await made.start()
    yield made
    await made.stop()


async def profile_with(http: httpx.AsyncClient, *workers: str) -> Profile:
    """The last second, once it is of these workers."""
    while True:
        answer = await http.get("/v1/profile", params={"window": "1s"})
        if answer.status_code == 200 and set((found := from_json(answer.content)).workers) >= set(workers):
            return found


async def codes(http: httpx.AsyncClient) -> dict[str, str]:
    return {held["code"]: held["text"] for held in (await http.get("/health")).json()["conditions"]}


async def test_a_profile_tells_what_each_process_used_and_what_its_worker_served(
    tmp_path: Path, probe: BusyProbe
) -> None:
    async with daemon(tmp_path / "home") as http:
        await profile_with(http, "chat", "embed", "daemon")
        await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
        answer = await http.post("/v1/query", json={"query": "When does the relief valve of pump P7 open?"})
        chat = from_json((await http.get("/v1/profile", params={"window": "15m"})).content).workers["chat"]
        while chat.requests is None or not chat.requests.value:
            chat = from_json((await http.get("/v1/profile", params={"window": "15m"})).content).workers["chat"]
        health = (await http.get("/health")).json()
        found = await profile_with(http, "daemon")
    assert answer.json()["step"] == "generated"
    assert (found.device, found.step) == ("pump-house", Step.EBPF)
    assert found.workers["daemon"].pid == os.getpid()
    assert chat.pid == health["chat"]["pid"]
    assert chat.model.startswith("chat@")
    assert chat.cpu_seconds is not None
    assert (chat.cpu_seconds.sources, chat.cpu_seconds.confidence) == ((Source.EBPF,), 1.0)
    assert chat.completion_tokens is not None
    assert chat.completion_tokens.value > 0
    assert (health["probe"]["linked"], health["probe"]["step"], health["status"]) == (True, "ebpf", "ok")
    assert 0 < health["probe"]["cpu_share"] < 0.01


async def test_windows_are_as_long_as_asked_for_and_come_as_json_or_msgpack(tmp_path: Path, probe: BusyProbe) -> None:
    async with daemon(tmp_path / "home") as http:
        await profile_with(http, "chat")
        while from_json((await http.get("/v1/profile", params={"window": "15m"})).content).seconds < 25:
            pass
        ten = from_json((await http.get("/v1/profile")).content)
        accept = {"accept": "application/msgpack"}
        minute = from_msgpack((await http.get("/v1/profile", params={"window": "1m"}, headers=accept)).content)
        refused = await http.get("/v1/profile", params={"window": "2h"})
    assert ten.seconds == 10
    assert minute.seconds > 20
    assert refused.status_code == 422
    assert "window" in refused.json()["detail"]


async def test_each_second_comes_as_an_event(tmp_path: Path, probe: BusyProbe) -> None:
    async with daemon(tmp_path / "home") as http:
        await profile_with(http, "chat")
        async with http.stream("GET", "/v1/profile", headers={"accept": "text/event-stream"}) as response:
            lines: list[str] = []
            async for line in response.aiter_lines():
                lines.append(line)
                if lines.count("") == 3:
                    break
    events = list(server_sent_events(lines))
    assert [name for name, _ in events] == ["profile"] * 3
    times = [from_json(data).at for _, data in events]
    assert times == sorted(set(times))


async def test_streams_end_in_order_when_the_daemon_stops(tmp_path: Path, probe: BusyProbe) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http, contextlib.AsyncExitStack() as stack:
        serving = await stack.enter_async_context(contextlib.AsyncExitStack())
        client = await serving.enter_async_context(daemon(tmp_path / "home"))
        await profile_with(client, "chat")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "home" / "profile.sock")
        url = client.base_url.join("/v1/profile")
        async with http.stream("GET", url, headers={"accept": "text/event-stream"}) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "event: profile"
            stopping = asyncio.create_task(serving.aclose())
            assert [line async for line in lines][-1] == ""
        assert (await reader.read())[-1:] in (b"\n", b"")
        writer.close()
        await stopping


async def test_a_coordinator_on_the_device_reads_each_second_from_the_socket(tmp_path: Path, probe: BusyProbe) -> None:
    async with daemon(tmp_path / "home") as http:
        await profile_with(http, "chat")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "home" / "profile.sock")
        first, second = from_json(await reader.readline()), from_json(await reader.readline())
        writer.close()
    assert first.at < second.at
    assert not (tmp_path / "home" / "profile.sock").exists()


@pytest.mark.broker
async def test_the_profile_is_retained_at_the_broker(tmp_path: Path, probe: BusyProbe, mosquitto: Mosquitto) -> None:
    def retained() -> Profile:
        with MqttClient(mosquitto.port, "coordinator", "edged/+/profile") as watcher:
            message = watcher.next_raw()
        assert message.topic == "edged/pump-house/profile"
        return from_json(bytes(message.payload))

    overrides = {"mqtt__enabled": True, "mqtt__url": mosquitto.url}
    async with daemon(tmp_path / "home", **overrides) as http:
        await profile_with(http, "chat")
        found = await asyncio.to_thread(retained)
        assert found.device == "pump-house"
        while not (found := await asyncio.to_thread(retained)).workers.get("chat"):
            pass  # what came first may have been measured before the worker was there
        await asyncio.to_thread(mosquitto.kill)  # what it retained may be lost with it
        await asyncio.to_thread(mosquitto.start)
        assert (await asyncio.to_thread(retained)).at >= found.at
    assert (await asyncio.to_thread(retained)).device == "pump-house"


async def test_prometheus_is_told_of_the_workers(tmp_path: Path, probe: BusyProbe) -> None:
    async with daemon(tmp_path / "home") as http:
        await profile_with(http, "chat")
        text = (await http.get("/metrics")).text
    assert 'edged_profile_cpu_seconds_total{core="0",worker="chat"}' in text
    assert 'edged_probe_step{step="ebpf"} 1.0' in text
    assert 'edged_condition{code="probe_absent"} 0.0' in text


async def test_a_worker_that_takes_another_process_is_watched_there(tmp_path: Path, probe: BusyProbe) -> None:
    async with daemon(tmp_path / "home") as http:
        before = (await profile_with(http, "chat")).workers["chat"].pid
        await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
        await http.post("/v1/query", json={"query": "When does the relief valve of pump P7 open? kill@request"})
        # Its second run takes the next process with it as well: the one that stays is the one to be watched.
        while (pid := (await http.get("/health")).json()["chat"]["pid"]) in (None, before):
            pass
        while (await profile_with(http, "chat")).workers["chat"].pid != pid:
            pid = (await http.get("/health")).json()["chat"]["pid"]


async def test_without_a_probe_the_daemon_measures_itself_and_goes_up_again_when_it_comes(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home") as http:
        alone = await profile_with(http, "chat", "embed", "daemon")
        assert alone.step in (Step.COUNTERS, Step.PROCFS)
        assert "no probe answers at" in alone.reason
        assert alone.workers["chat"].resident_bytes is not None
        health = (await http.get("/health")).json()
        held = await codes(http)
        assert (health["status"], health["probe"]["linked"]) == ("ok", False)
        assert held["probe_absent"].startswith(f"measured by {alone.step.value}: no probe answers at")
        probe = BusyProbe(tmp_path / "home" / "probe.sock")
        await probe.start()
        while (await profile_with(http, "chat")).step is not Step.EBPF:
            pass
        assert "probe_absent" not in await codes(http)
        await probe.stop()
        while (await profile_with(http, "chat")).step is Step.EBPF:
            pass
        assert "probe_absent" in await codes(http)


async def test_where_profiles_are_switched_off_nothing_is_measured(tmp_path: Path) -> None:
    async with daemon(tmp_path / "home", probe__enabled=False) as http:
        refused = await http.get("/v1/profile")
        health = (await http.get("/health")).json()
    assert (refused.status_code, refused.json()["code"]) == (503, "profile_unavailable")
    assert "probe.enabled" in refused.json()["hint"]
    assert health["probe"] is None
    assert not (tmp_path / "home" / "profile.sock").exists()
