"""One MQTT connection: a paho client whose callbacks become futures and calls on the event loop."""

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edged import credentials
from edged.config import Mqtt, split_broker_url
from edged.events.outbox import DisconnectedError, PublishRefusedError

UNSUPPORTED_PROTOCOL_VERSION = 132  # MQTT 5.0, section 3.2.2.2
CONNECT_TIMEOUT_SECONDS = 10.0
FRAME_BYTES = 40
"""What a PUBLISH has beside topic, correlation data and payload, at most (MQTT 5.0, section 3.3)."""
VERSIONS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}


class NoAnswerError(Exception):
    """There was a connection, and nothing came over it that answers ours."""


class Message(msgspec.Struct, frozen=True):
    """A received PUBLISH, free of paho's types; topic and correlation data for its answer as its sender gave them."""

    topic: str
    payload: bytes
    mid: int
    qos: int
    dup: bool
    retained: bool
    response_topic: str | None
    correlation: bytes | None

    @property
    def reply_topic(self) -> str | None:
        """Where the sender wants the answer; a topic that cannot be published to is as none."""
        wanted = self.response_topic
        return None if not wanted or any(mark in wanted for mark in "+#\0") else wanted

    def delivery(self, session: str) -> str | None:
        """A name for one transmission in the broker's session of that name, by which its redelivery is recognised."""
        if self.qos == 0:
            return None
        digest = blake2b(self.topic.encode() + b"\0" + self.payload, digest_size=12).hexdigest()
        return f"{session}:{self.mid}:{digest}"


class Connected(msgspec.Struct, frozen=True):
    """The broker's CONNACK; ``refused`` is its reason not to serve."""

    session_present: bool
    refused: str | None
    wrong_version: bool
    largest_packet_bytes: int | None


class Connection:
    """One paho client and one TCP connection; its callbacks arrive on paho's thread and leave it at once.

    ``on_subscribed`` learns of each filter whether the broker granted it (None) or why not.
    ``session`` gets the name of the broker's session; it is cancelled where the connection ends before.
    """

    def __init__(
        self,
        settings: Mqtt,
        version: MQTTProtocolVersion,
        on_message: Callable[["Connection", Message], None],
        on_subscribed: Callable[[str, str | None], None],
        *,
        will: bytes,
    ) -> None:
        self.version = version
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._subscribing: dict[int, str] = {}
        self._answered: asyncio.Future[Connected] = self._loop.create_future()
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self.session: asyncio.Future[str] = self._loop.create_future()
        self._unacknowledged: dict[int, asyncio.Future[None]] = {}
        self._largest_packet_bytes: int | None = None
        self._settings = settings
        self._will = will
        self._client = self._build()

    @property
    def is_version_5(self) -> bool:
        return self.version == MQTTProtocolVersion.MQTTv5

    @property
    def version_name(self) -> str:
        return "5" if self.is_version_5 else "3.1.1"

    async def open(self) -> Connected:
        """Connect and wait for the broker's answer.

        Raises ``OSError`` without a connection, ``NoAnswerError`` on one, :class:`ConfigError`.
        """
        host, port, _ = split_broker_url(self._settings.url)
        await asyncio.to_thread(self._connect, host, port)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                return await self._answered
        except TimeoutError as error:
            raise NoAnswerError(f"no answer within {CONNECT_TIMEOUT_SECONDS:.0f} s") from error

    def subscribe(self, filters: Iterable[str]) -> None:
        """Subscribe with QoS 1, each filter by itself, so that a bad one hinders no other.

        Retained values are states and no events: MQTT 5 is asked to leave them out, older versions send them marked.
        """
        for name in filters:
            try:
                _, mid = self._subscribe(name)
            except ValueError as error:  # no topic filter by section 4.7 of MQTT 5.0
                self._on_subscribed(name, str(error))
                continue
            if mid is not None:  # else the connection has ended
                self._subscribing[mid] = name

    def _subscribe(self, name: str) -> tuple[MQTTErrorCode, int | None]:
        if not self.is_version_5:
            return self._client.subscribe(name, qos=1)
        return self._client.subscribe(
            name, options=SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        )

    async def publish(self, topic: str, body: bytes, *, correlation: bytes | None = None, retain: bool = False) -> None:
        """Publish with QoS 1 and wait for the acknowledgement."""
        properties = None
        if self.is_version_5:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ContentType = "application/json"
            if correlation is not None:
                properties.CorrelationData = correlation
        if self.ended.done():
            raise DisconnectedError(self.ended.result())
        limit = self._largest_packet_bytes
        if limit is not None and len(topic.encode()) + len(body) + len(correlation or b"") + FRAME_BYTES > limit:
            # A broker ends the connection for such a packet: sent again on each, it would hold up all others.
            raise PublishRefusedError(f"the message has {len(body)} bytes, and it takes packets of {limit} at most")
        acknowledged = self._loop.create_future()
        try:
            sent = self._client.publish(topic, body, qos=1, retain=retain, properties=properties)
        except ValueError as error:  # a topic with wildcards, or a payload above the protocol's limit
            raise PublishRefusedError(str(error)) from error
        if sent.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise DisconnectedError(paho.error_string(sent.rc))
        # The acknowledgement comes by call_soon_threadsafe, so never before this line has run.
        self._unacknowledged[sent.mid] = acknowledged
        try:
            await acknowledged
        finally:
            self._unacknowledged.pop(sent.mid, None)

    def show(self, topic: str, body: bytes) -> None:
        """Publish with QoS 0 and forget."""
        self._client.publish(topic, body, qos=0)

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Get these no more."""
        if filters:
            self._client.unsubscribe(list(filters))

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that a message is ours now."""
        if message.qos > 0 and not self.ended.done():
            self._client.ack(message.mid, message.qos)

    def abandon(self, reason: str) -> None:
        """Serve no longer; whoever waits for the end closes the connection."""
        self._end(reason)

    async def close(self) -> None:
        """Say goodbye and end paho's thread. Idempotent."""
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)
        self._end("closed")
        # paho closes the pipe to its thread when the client is freed, which our callbacks, pointing back here, hold up.
        client = self._client
        client.on_connect = client.on_disconnect = client.on_connect_fail = None
        client.on_message = client.on_publish = client.on_subscribe = None

    def _build(self) -> paho.Client:
        settings = self._settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=self.version,
            clean_session=None if self.is_version_5 else False,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.max_inflight_messages_set(0)  # the outbox has its own window
        client.on_socket_open = _send_at_once
        client.on_connect = self._connected_callback
        client.on_disconnect = self._disconnected_callback
        client.on_connect_fail = lambda _client, _data: self._call(self._end, "the connection failed")
        client.on_message = self._message_callback
        client.on_publish = self._published_callback
        client.on_subscribe = self._subscribed_callback
        client.will_set(settings.status_topic, self._will, qos=1, retain=True)
        return client

    def _connect(self, host: str, port: int) -> None:
        """Read the credentials' files and connect; blocks until TCP stands, the rest is paho's thread's."""
        settings, keepalive = self._settings, self._settings.keepalive_seconds
        if settings.username is not None:
            self._client.username_pw_set(settings.username, credentials.password(settings))
        if (context := credentials.client_context(settings)) is not None:
            self._client.tls_set_context(context)
        self._client.connect_timeout = CONNECT_TIMEOUT_SECONDS
        if self.is_version_5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = self._settings.session_expiry_seconds
            properties.ReceiveMaximum = self._settings.receive_maximum
            self._client.connect(host, port, keepalive=keepalive, clean_start=False, properties=properties)
        else:
            self._client.connect(host, port, keepalive=keepalive)
        self._client.loop_start()

    # --- paho's thread ---------------------------------------------------------------------------------

    def _call(self, function: Callable[..., None], *values: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *values)

    def _connected_callback(
        self, _client: paho.Client, _data: object, flags: paho.ConnectFlags, code: ReasonCode, properties: object
    ) -> None:
        refused = str(code) if code.is_failure else None
        wrong_version = code.value == UNSUPPORTED_PROTOCOL_VERSION
        largest = getattr(properties, "MaximumPacketSize", None)
        self._call(self._set_answer, Connected(flags.session_present, refused, wrong_version, largest))

    def _disconnected_callback(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        self._call(self._end, str(code))

    def _message_callback(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        properties = message.properties
        received = Message(
            topic=message.topic,
            payload=bytes(message.payload),
            mid=message.mid,
            qos=message.qos,
            dup=message.dup,
            retained=message.retain,
            response_topic=getattr(properties, "ResponseTopic", None),
            correlation=getattr(properties, "CorrelationData", None),
        )
        self._call(self._on_message, self, received)

    def _published_callback(
        self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _properties: object
    ) -> None:
        self._call(self._settle, mid, str(code) if code.is_failure else None)

    def _subscribed_callback(
        self, _client: paho.Client, _data: object, mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        self._call(self._settle_subscription, mid, next((str(code) for code in codes if code.is_failure), None))

    # --- the event loop --------------------------------------------------------------------------------

    def _set_answer(self, answer: Connected) -> None:
        self._largest_packet_bytes = answer.largest_packet_bytes
        if not self._answered.done():
            self._answered.set_result(answer)

    def _settle(self, mid: int, refused: str | None) -> None:
        waiting = self._unacknowledged.get(mid)
        if waiting is None or waiting.done():
            return
        if refused is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(PublishRefusedError(refused))

    def _settle_subscription(self, mid: int, refused: str | None) -> None:
        name = self._subscribing.pop(mid, None)
        if name is not None:
            self._on_subscribed(name, refused)

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)
        self.session.cancel()
        if not self._answered.done():
            self._answered.set_exception(NoAnswerError(f"the broker hung up: {reason}"))
            self._answered.exception()  # nobody may be waiting any more
        for waiting in self._unacknowledged.values():
            if not waiting.done():
                waiting.set_exception(DisconnectedError(reason))


def _send_at_once(_client: paho.Client, _data: object, connection: Any) -> None:
    # paho leaves Nagle's algorithm on: an answer then waits up to 40 ms for the broker's kernel to acknowledge.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
