"""A sensor of the tests: a paho client whose messages are waited for, not polled."""

import json
import queue
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

WAIT_SECONDS = 60.0


class MqttClient:
    """Connects at once, subscribes, publishes with QoS 1 and waits for the acknowledgement."""

    def __init__(self, port: int, name: str = "sensor", *topics: str, login: tuple[str, str] | None = None) -> None:
        self.messages: queue.Queue[paho.MQTTMessage] = queue.Queue()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5)
        if login is not None:
            self._client.username_pw_set(*login)
        subscribed: queue.Queue[None] = queue.Queue()

        def connected(client: paho.Client, *_: object) -> None:
            if topics:
                client.subscribe([(topic, 1) for topic in topics])
            else:
                subscribed.put(None)

        self._client.on_connect = connected
        self._client.on_subscribe = lambda *_: subscribed.put(None)
        self._client.on_message = lambda _client, _data, message: self.messages.put(message)
        self._client.connect("127.0.0.1", port, clean_start=True)
        self._client.loop_start()
        subscribed.get(timeout=WAIT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        self._client.on_message = None  # else the two hold each other, and paho's sockets are closed in any order

    def publish(
        self,
        topic: str,
        payload: str | bytes | dict[str, Any],
        *,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        retain: bool = False,
    ) -> None:
        """Publish; returns when the broker has it."""
        properties = Properties(PacketTypes.PUBLISH)
        if response_topic is not None:
            properties.ResponseTopic = response_topic
        if correlation is not None:
            properties.CorrelationData = correlation
        body = json.dumps(payload) if isinstance(payload, dict) else payload
        self._client.publish(topic, body, qos=1, retain=retain, properties=properties).wait_for_publish(WAIT_SECONDS)

    def next(self) -> tuple[str, Any]:
        """The next message: topic and parsed JSON."""
        message = self.next_raw()
        return message.topic, json.loads(message.payload)

    def next_raw(self) -> paho.MQTTMessage:
        return self.messages.get(timeout=WAIT_SECONDS)
