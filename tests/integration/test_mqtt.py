"""The MQTT door with a real mosquitto and a whole daemon; only the model is a fake."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from edged.daemon import running
from edged.errors import DiskFullError, StoreError
from edged.events.admission import Admission
from edged.events.event import Incoming, Outcome
from edged.events.inbox import Accepted, Inbox
from edged.events.trigger import TopicRule
from edged.gateway import mqtt, mqtt_connection
from edged.runtime.health import MQTT_REFUSED, MQTT_SUBSCRIBE_REFUSED, SERVICE_FAILING, ConditionKind, Health
from tests.broker import Mosquitto, refusing
from tests.daemon_process import FAKE_WORKER, DaemonProcess, configure
from tests.mqtt_client import MqttClient

pytestmark = pytest.mark.broker

MANUAL = "The relief valve of pump P7 opens at 12 bar. The pump P7 holds 4 litres of oil."
TOPIC = {"filter": "plant/+/pressure", "question": "At what pressure does the relief valve of {topic[1]} open?"}


@contextlib.asynccontextmanager
async def daemon(home: Path, broker: Mosquitto, **overrides: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A daemon that knows the manual and is connected to the broker; gives a client of its HTTP door."""
    names = {name.replace("__", "."): value for name, value in overrides.items()}
    config = configure(home, {"mqtt.url": broker.url, "events.topics": [TOPIC], **names})
    async with (
        running(config, worker_command=FAKE_WORKER) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as http,
    ):
        await http.post("/v1/documents", json={"id": "p7", "text": MANUAL})
        yield http


async def status(broker: Mosquitto, wanted: str) -> None:
    """Wait for the daemon's retained status."""

    def wait() -> None:
        with MqttClient(broker.port, f"watch-{wanted}", "edged/status") as watcher:
            while watcher.next()[1]["status"] != wanted:
                pass

    await asyncio.to_thread(wait)


async def ask(sensor: MqttClient, topic: str, payload: Any, **properties: Any) -> tuple[str, Any]:
    await asyncio.to_thread(sensor.publish, topic, payload, **properties)
    return await asyncio.to_thread(sensor.next)


async def test_a_question_is_answered_with_citations_timings_and_model(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            payload = {"query": "When does the relief valve of pump P7 open?", "id": "q-1"}
            topic, body = await ask(sensor, "edged/query", payload)
    assert topic == "edged/answer/q-1"
    assert body["id"] == "q-1"
    assert "12 bar" in body["answer"]
    assert body["step"] == "generated"
    assert body["citations"][0]["document_id"] == "p7"
    assert body["timings"]["total_ms"] > 0
    assert body["model"].startswith("chat@")


async def test_plain_text_is_a_question_and_gets_an_id(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            topic, body = await ask(sensor, "edged/query", "How much oil does pump P7 hold?")
    assert topic == f"edged/answer/{body['id']}"
    assert body["citations"][0]["document_id"] == "p7"


async def test_the_answer_goes_to_the_response_topic_with_its_correlation(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "reply/#") as sensor:
            publish = sensor.publish
            await asyncio.to_thread(
                publish, "edged/query", "Oil of pump P7?", response_topic="reply/me", correlation=b"\x01\xff"
            )
            message = await asyncio.to_thread(sensor.next_raw)
    assert message.topic == "reply/me"
    assert message.properties is not None
    properties = message.properties.json()
    assert bytes.fromhex(properties["CorrelationData"]) == b"\x01\xff"
    assert properties["ContentType"] == "application/json"


async def test_a_plain_value_on_a_configured_topic_asks_its_question(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            _, body = await ask(sensor, "plant/P7/pressure", "11.8")
    assert "12 bar" in body["answer"]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'{"query": 5}', "request_invalid"),
        (b'{"quary": "x"}', "request_invalid"),
        (b"{", "request_invalid"),
        (b"\xff\xfe", "request_invalid"),
        (b"", "request_invalid"),
        (b"x" * 70_000, "payload_too_large"),
    ],
)
async def test_a_payload_that_cannot_be_used_gets_an_error_and_the_next_one_is_served(
    tmp_path: Path, mosquitto: Mosquitto, payload: bytes, code: str
) -> None:
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            topic, body = await ask(sensor, "edged/query", payload)
            assert topic == f"edged/answer/{body['id']}"
            assert body["error"]["code"] == code
            assert body["error"]["hint"]
            _, answer = await ask(sensor, "edged/query", "Oil of pump P7?")
    assert answer["citations"][0]["document_id"] == "p7"


async def test_a_repeated_event_is_answered_from_its_stored_outcome(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with daemon(tmp_path / "home", mosquitto) as http:
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            _, first = await ask(sensor, "edged/query", {"query": "Oil of pump P7?", "id": "same"})
            _, second = await ask(sensor, "edged/query", {"query": "Oil of pump P7?", "id": "same"})
        metrics = (await http.get("/metrics")).text
    assert first == second
    assert 'edged_events_accepted_total{status="closed"} 1.0' in metrics


@pytest.mark.parametrize(
    "wrong",
    [{"quary": "Oil?"}, {"query": 5}, {"query": "Oil?", "deadline_ms": -1}, {"query": "Oil?", "collection": ""}],
)
async def test_the_error_of_a_request_with_a_usable_id_goes_where_its_sender_listens(
    tmp_path: Path, mosquitto: Mosquitto, wrong: dict[str, Any]
) -> None:
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/7") as sensor:
            _, refused = await ask(sensor, "edged/query", {**wrong, "id": "7"})
            _, answered = await ask(sensor, "edged/query", {"query": "Oil of pump P7?", "id": "7"})
            _, again = await ask(sensor, "edged/query", {**wrong, "id": "7"})
            _, repeated = await ask(sensor, "edged/query", {"query": "Oil of pump P7?", "id": "7"})
    assert (refused["id"], refused["error"]["code"]) == ("7", "request_invalid")
    assert answered["citations"][0]["document_id"] == "p7"
    assert (again["id"], again["error"]) == ("7", refused["error"])
    assert repeated == answered  # the mistake in between took nothing away
    assert len({message["answer_id"] for message in (refused, answered, again)}) == 3


async def test_an_id_used_again_for_another_question_is_asked_that(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with daemon(tmp_path / "home", mosquitto) as http:
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            _, first = await ask(sensor, "edged/query", {"query": "When does the relief valve of P7 open?", "id": "1"})
            _, second = await ask(sensor, "edged/query", {"query": "How much oil does pump P7 hold?", "id": "1"})
        metrics = (await http.get("/metrics")).text
    assert 'edged_events_accepted_total{status="new"} 2.0' in metrics
    assert first["answer_id"] != second["answer_id"]


async def test_an_id_whose_event_is_open_is_refused_to_another_one(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_event, asked = Inbox.close_event, asyncio.Event()

    async def later(inbox: Inbox, event_id: str, outcome: Outcome, body: bytes) -> bool:
        await asked.wait()
        return await close_event(inbox, event_id, outcome, body)

    monkeypatch.setattr(Inbox, "close_event", later)
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "reply/#") as sensor:
            first, second = {"query": "Oil of pump P7?", "id": "1"}, {"query": "another question", "id": "1"}
            await asyncio.to_thread(sensor.publish, "edged/query", first, response_topic="reply/a")
            refused = await ask(sensor, "edged/query", second, response_topic="reply/b")
            asked.set()
            answered = await asyncio.to_thread(sensor.next)
    assert (refused[0], refused[1]["id"], refused[1]["error"]["code"]) == ("reply/b", "1", "id_reused")
    assert (answered[0], answered[1]["citations"][0]["document_id"]) == ("reply/a", "p7")
    assert refused[1]["answer_id"] != answered[1]["answer_id"]


async def test_what_was_published_while_edged_was_away_is_answered_when_it_is_back(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    async with daemon(tmp_path / "home", mosquitto):
        await status(mosquitto, "ok")
    await status(mosquitto, "offline")
    with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
        await asyncio.to_thread(sensor.publish, "edged/query", {"query": "Oil of pump P7?", "id": "while-away"})
        async with daemon(tmp_path / "home", mosquitto):
            topic, _ = await asyncio.to_thread(sensor.next)
    assert topic == "edged/answer/while-away"


async def test_what_waited_at_the_broker_is_known_by_the_session_however_late_that_gets_its_name(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, remembered, received = Inbox.accept, Inbox.remembered, mqtt.MqttGateway._received
    arrived = asyncio.Event()
    sessions: list[str] = []

    async def noting(inbox: Inbox, incoming: Incoming) -> Accepted:
        sessions.append((incoming.delivery or "").partition(":")[0])
        return await accept(inbox, incoming)

    async def late(inbox: Inbox, key: str) -> str | None:
        await arrived.wait()
        return await remembered(inbox, key)

    def noticing(*arguments: Any) -> None:
        received(*arguments)
        arrived.set()

    monkeypatch.setattr(Inbox, "accept", noting)
    with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
        async with daemon(tmp_path / "home", mosquitto):
            await status(mosquitto, "ok")
            await ask(sensor, "edged/query", "Oil of pump P7?")
        await status(mosquitto, "offline")
        await asyncio.to_thread(sensor.publish, "edged/query", "Oil of pump P7, again?")
        monkeypatch.setattr(Inbox, "remembered", late)
        monkeypatch.setattr(mqtt.MqttGateway, "_received", noticing)
        async with daemon(tmp_path / "home", mosquitto):
            await asyncio.to_thread(sensor.next)
    assert sessions[0]
    assert sessions == [sessions[0]] * 2


async def test_a_broker_that_restarts_finds_edged_again_with_its_subscriptions(
    tmp_path: Path, mosquitto: Mosquitto
) -> None:
    quick = {"mqtt__reconnect_min_seconds": 0.05, "mqtt__reconnect_max_seconds": 0.2}
    async with daemon(tmp_path / "home", mosquitto, **quick) as http:
        await status(mosquitto, "ok")
        await asyncio.to_thread(mosquitto.kill)  # sessions and subscriptions are gone with it
        while "mqtt_disconnected" not in {held["code"] for held in (await http.get("/health")).json()["conditions"]}:
            pass
        await asyncio.to_thread(mosquitto.start)
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            _, body = await ask(sensor, "edged/query", "Oil of pump P7?")
    assert body["citations"][0]["document_id"] == "p7"


async def test_two_devices_of_one_name_are_told_of_each_other(tmp_path: Path, mosquitto: Mosquitto) -> None:
    quick = {"mqtt__reconnect_min_seconds": 0.05, "mqtt__reconnect_max_seconds": 0.2}
    async with daemon(tmp_path / "one", mosquitto, **quick) as http, daemon(tmp_path / "other", mosquitto, **quick):
        while "is another client named edged?" not in (await http.get("/health")).text:
            pass


async def test_an_event_the_store_did_not_take_is_delivered_again(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Inbox.accept
    failures = 2

    async def failing(inbox: Inbox, incoming: Incoming) -> Accepted:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreError("the disk is gone")
        return await accept(inbox, incoming)

    monkeypatch.setattr(Inbox, "accept", failing)
    quick = {"mqtt__reconnect_min_seconds": 0.05, "mqtt__reconnect_max_seconds": 0.2}
    async with daemon(tmp_path / "home", mosquitto, **quick):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            topic, _ = await ask(sensor, "edged/query", {"query": "Oil of pump P7?", "id": "stubborn"})
    assert topic == "edged/answer/stubborn"
    assert failures == 0


async def test_the_last_will_says_offline_when_edged_dies(tmp_path: Path, mosquitto: Mosquitto) -> None:
    process = DaemonProcess(tmp_path / "home", {"mqtt.url": mosquitto.url})
    await asyncio.to_thread(process.start)
    await status(mosquitto, "ok")
    await asyncio.to_thread(process.kill)
    await status(mosquitto, "offline")


async def test_user_and_password_are_sent_and_a_refusal_is_a_named_condition(
    tmp_path: Path, make_mosquitto: Callable[..., Mosquitto]
) -> None:
    passwords = tmp_path / "passwords"
    passwords.write_text("")
    passwords.chmod(0o700)
    make = await asyncio.create_subprocess_exec("mosquitto_passwd", "-b", str(passwords), "edged", "secret")
    await make.wait()
    broker = await asyncio.to_thread(make_mosquitto, f"allow_anonymous false\npassword_file {passwords}\n")
    secret = tmp_path / "secret"
    secret.write_text("wrong\n")
    overrides = {
        "mqtt__username": "edged",
        "mqtt__password_file": str(secret),
        "mqtt__reconnect_min_seconds": 0.05,
        "mqtt__reconnect_max_seconds": 0.2,
    }
    async with daemon(tmp_path / "home", broker, **overrides) as http:
        while "mqtt_disconnected" not in (refused := (await http.get("/health")).text):
            pass
        secret.write_text("secret\n")
        while not (await http.get("/health")).json()["mqtt"]["connected"]:
            pass
    assert "Not authorized" in refused or "not authori" in refused.lower()


async def test_answers_are_shown_as_they_grow_where_configured(tmp_path: Path, mosquitto: Mosquitto) -> None:
    async with daemon(tmp_path / "home", mosquitto, mqtt__stream_answers=True):
        await status(mosquitto, "ok")
        with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
            await asyncio.to_thread(
                sensor.publish, "edged/query", {"query": "When does the relief valve of pump P7 open?", "id": "s"}
            )
            text = ""
            while True:
                topic, body = await asyncio.to_thread(sensor.next)
                if topic == "edged/answer/s":
                    break
                text += body["delta"]
    assert text.strip() == body["answer"]


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_retained_value_from_before_asks_nothing_at_any_connection_and_the_next_value_does(
    tmp_path: Path, mosquitto: Mosquitto, protocol: str
) -> None:
    overrides = {"mqtt__protocol": protocol, "mqtt__reconnect_min_seconds": 0.05, "mqtt__reconnect_max_seconds": 0.2}
    with MqttClient(mosquitto.port, "sensor", "edged/answer/#") as sensor:
        await asyncio.to_thread(sensor.publish, "plant/P7/pressure", "1.0", retain=True)
        for number in range(3):
            async with daemon(tmp_path / "home", mosquitto, **overrides) as http:
                await status(mosquitto, "ok")
                _, body = await ask(sensor, "plant/P7/pressure", f"11.{number}", retain=True)
                metrics = (await http.get("/metrics")).text
            await status(mosquitto, "offline")
            assert "12 bar" in body["answer"]
            assert 'edged_events_accepted_total{status="new"} 1.0' in metrics
    assert sensor.messages.empty()


def condition(body: dict[str, Any], kind: ConditionKind) -> str | None:
    return next((held["text"] for held in body["conditions"] if held["code"] == kind.code), None)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_refused_subscription_is_named_asked_for_again_and_forgotten_once_it_is_granted(
    tmp_path: Path, make_mosquitto: Callable[..., Mosquitto], monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(mqtt, "SUBSCRIBE_AGAIN_SECONDS", 0.05)
    broker = await asyncio.to_thread(make_mosquitto, refusing(tmp_path, "plant/#"))
    overrides = {"mqtt__protocol": protocol, "mqtt__reconnect_min_seconds": 0.05, "mqtt__reconnect_max_seconds": 0.2}

    async def told(http: httpx.AsyncClient) -> str | None:
        return condition((await http.get("/health")).json(), MQTT_SUBSCRIBE_REFUSED)

    async with daemon(tmp_path / "home", broker, **overrides) as http:
        while (refused := await told(http)) is None:
            pass
        await asyncio.to_thread(broker.until_logged, "plant/+/pressure", 3)
        with MqttClient(broker.port, "sensor", "edged/answer/#") as sensor:
            await ask(sensor, "edged/query", "Oil of pump P7?")
        await asyncio.to_thread(broker.stop)
        (tmp_path / "rules.json").write_text((tmp_path / "rules.json").read_text().replace("plant/#", "other/#"))
        await asyncio.to_thread(broker.start)
        while await told(http) is not None:
            pass
        with MqttClient(broker.port, "sensor", "edged/answer/#") as sensor:
            await ask(sensor, "plant/P7/pressure", "11.8")
    assert refused.startswith("no messages come from plant/+/pressure (")


async def test_an_answer_larger_than_the_broker_takes_is_set_aside_and_the_next_one_comes(
    tmp_path: Path, make_mosquitto: Callable[..., Mosquitto]
) -> None:
    broker = await asyncio.to_thread(make_mosquitto, "allow_anonymous true\nmax_packet_size 400")
    async with daemon(tmp_path / "home", broker) as http:
        await status(broker, "ok")
        with MqttClient(broker.port, "sensor", "edged/answer/#") as sensor:
            await asyncio.to_thread(sensor.publish, "edged/query", {"query": "Oil of pump P7?", "id": "long"})
            topic, _ = await ask(sensor, "edged/query", {"quary": "?", "id": "short"})
        body = (await http.get("/health")).json()
        while (why := condition(body, MQTT_REFUSED)) is None:
            body = (await http.get("/health")).json()
    assert topic == "edged/answer/short"
    assert body["mqtt"]["connected"]
    assert "edged/answer/long" in why
    assert "packets of 400 at most" in why


async def test_a_defect_in_the_service_is_named_in_health(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(mqtt.MqttGateway, "_begin", broken)
    async with daemon(tmp_path / "home", mosquitto) as http:
        while (why := condition((await http.get("/health")).json(), SERVICE_FAILING)) is None:
            pass
    assert why == "mqtt: ValueError: no such thing"


async def test_a_disk_that_takes_nothing_more_does_not_keep_the_door_from_its_session(
    tmp_path: Path, mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that are stored must get out, and the broker holds the questions."""
    inbox = await Inbox.open(tmp_path / "events.db")
    settings = configure(tmp_path / "home", {"mqtt.url": mosquitto.url}).mqtt

    async def full(*_: object) -> None:
        raise DiskFullError("no space left on device")

    for filters in (["plant/a"], ["plant/b"]):
        health = Health()
        gateway = mqtt.MqttGateway(
            settings,
            inbox,
            health,
            rules=[TopicRule(filter=name, question="?") for name in filters],
            admission=Admission(health, limit=10, open_events=0),
            on_accepted=lambda _: None,
            status=dict,
            farewell={},
        )
        serving = asyncio.create_task(gateway.run())
        await asyncio.wait_for(gateway.connected(), 10)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        monkeypatch.setattr(inbox, "remember", full)
    await inbox.close()


async def test_a_filter_that_is_none_is_named_and_hinders_no_other(tmp_path: Path, mosquitto: Mosquitto) -> None:
    health, accepted = Health(), asyncio.Queue[Accepted]()
    inbox = await Inbox.open(tmp_path / "events.db")
    rules = [TopicRule(filter=name, question="?") for name in ("plant/#/x", "plant/+/pressure")]
    gateway = mqtt.MqttGateway(
        configure(tmp_path / "home", {"mqtt.url": mosquitto.url}).mqtt,
        inbox,
        health,
        rules=rules,
        admission=Admission(health, limit=10, open_events=0),
        on_accepted=accepted.put_nowait,
        status=dict,
        farewell={},
    )
    serving = asyncio.create_task(gateway.run())
    await gateway.connected()
    named = [(held.code, held.text) for held in health.conditions()]
    await asyncio.to_thread(mosquitto.until_logged, "edged 1 plant/+/pressure", 1)
    with MqttClient(mosquitto.port, "sensor") as sensor:
        await asyncio.to_thread(sensor.publish, "plant/P7/pressure", "11.8")
        assert (await accepted.get()).status == "new"
        gateway.use_rules([*rules[1:], TopicRule(filter="a#", question="?")])
        assert [held.text for held in health.conditions()] == [
            "no messages come from a# (Invalid subscription filter.)"
        ]
        gateway.use_rules(rules[1:])
        assert health.conditions() == ()
        await asyncio.to_thread(sensor.publish, "plant/P7/pressure", "11.9")
        assert (await accepted.get()).status == "new"
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await inbox.close()
    assert named == [
        ("mqtt_subscribe_refused", "no messages come from plant/#/x (Invalid subscription filter.)"),
    ]


async def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "CONNECT_TIMEOUT_SECONDS", 1.0)  # amqtt answers MQTT 5 with silence
    amqtt = await asyncio.create_subprocess_exec(
        FAKE_WORKER[0], "-m", "edged.demo.broker", str(free_port), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        quick = {"mqtt.reconnect_min_seconds": 0.05, "mqtt.reconnect_max_seconds": 0.2}
        config = configure(tmp_path / "home", {"mqtt.url": f"mqtt://127.0.0.1:{free_port}", **quick})
        async with (
            running(config, worker_command=FAKE_WORKER) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as http,
        ):
            while not (body := (await http.get("/health")).json())["mqtt"]["connected"]:
                pass
    finally:
        amqtt.terminate()
        await amqtt.wait()
    assert body["mqtt"]["protocol"] == "3.1.1"
