"""Check of the broker: whether it admits edged, and what it grants.

It subscribes too, with QoS 0 and outside of shared subscriptions, so that nothing can queue up for it and no message
comes to it in another's place. mosquitto with an ``acl_file`` grants any filter and withholds the messages; its plugins
and other brokers refuse. A client id of its own leaves the daemon's session alone. mosquitto does not tell when it
shortens a session (``persistent_client_expiration``; eclipse-mosquitto/mosquitto issue 3616).
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edged import credentials
from edged.config import Mqtt, split_broker_url
from edged.doctor.device import Device
from edged.doctor.finding import Finding, fail, ok, skip, warn
from edged.doctor.patience import bounded
from edged.errors import ConfigError
from edged.hardware import detect

ANSWER_SECONDS = 3.0
STEP_SECONDS = 0.2

# MQTT 5.0, section 3.2.2.2; paho gives the codes of 3.1.1 the same numbers
UNSUPPORTED_VERSION = 132
BAD_CREDENTIALS = 134
NOT_AUTHORISED = 135

SHARED = "$share/"
NO_ANSWER = "no answer"


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The broker's answer to CONNECT. ``code`` 0 admits; limits that it does not name are the protocol's."""

    version: str
    code: int
    reason: str = ""
    session_expiry_seconds: int | None = None
    maximum_packet_bytes: int | None = None
    maximum_qos: int = 2
    has_retain: bool = True
    has_shared_subscriptions: bool = True
    refused_topics: tuple[str, ...] = ()


class Broker(msgspec.Struct, frozen=True):
    """``reply`` is None without an answer; ``error`` then says why. ``has_address``: its name has one."""

    settings: Mqtt
    reply: Reply | None
    error: str = ""
    has_address: bool = True


def read_broker(device: Device) -> Broker:
    """Tries as the daemon does: MQTT 5, then 3.1.1 where the setting leaves it open."""
    settings = device.config.mqtt
    if not settings.enabled:
        return Broker(settings, None)
    if problem := _unresolved(settings):
        return Broker(settings, None, problem, has_address=False)
    here = device.config.at_device(detect.device_name(device.config.probe.device))
    filters = [here.mqtt.query_topic, *(topic.filter for topic in here.events.topics)]
    versions = ["5", "3.1.1"] if settings.protocol == "auto" else [settings.protocol]
    try:
        for version in versions:
            reply = _ask(settings, version, filters)
            if reply is not None and reply.code != UNSUPPORTED_VERSION:
                return Broker(settings, reply)
    except ConfigError as error:
        return Broker(settings, None, error.message)
    except OSError as error:
        return Broker(settings, None, error.strerror or str(error))
    return Broker(settings, None, f"it accepts a connection, but does not answer in MQTT {' or '.join(versions)}")


def _unresolved(settings: Mqtt) -> str:
    """Why the broker's name has no address; empty where it has one. Python waits without an end for a name server."""
    host, port, _ = split_broker_url(settings.url)
    found = bounded(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), ANSWER_SECONDS)
    if isinstance(found, TimeoutError):
        return f"the name {host} cannot be resolved: {NO_ANSWER} within {ANSWER_SECONDS:.0f} s"
    if isinstance(found, OSError):
        return f"the name {host} cannot be resolved: {found.strerror}"
    return ""


def _ask(settings: Mqtt, version: str, filters: Sequence[str]) -> Reply | None:
    """In two connections: the session that is asked for has no subscriptions, and the one that has ends with its
    connection. Wherever the doctor is cut off, nothing goes on at the broker.
    """
    with _connection(settings, version, settings.session_expiry_seconds) as (_, reply):
        if reply is None or reply.code:
            return reply
    with _connection(settings, version, 0) as (client, again):
        if again is None or again.code:
            return again
        return msgspec.structs.replace(reply, refused_topics=_refused_topics(client, reply, filters))


@contextlib.contextmanager
def _connection(
    settings: Mqtt, version: str, session_expiry_seconds: int
) -> Iterator[tuple[paho.Client, Reply | None]]:
    """A connection, and what the broker answered to it in time."""
    replies: list[Reply] = []

    def connected(_client: paho.Client, _data: object, _flags: object, code: ReasonCode, given: object) -> None:
        replies.append(_reply(version, code, given))

    client = _client(settings, version)
    client.on_connect = connected
    _open(client, settings, version, session_expiry_seconds)
    try:
        _turn(client, lambda: bool(replies))
        yield client, replies[0] if replies else None
    finally:
        _leave(client, version)


def _refused_topics(client: paho.Client, reply: Reply, filters: Sequence[str]) -> tuple[str, ...]:
    """The filters that the broker does not let edged subscribe to, those that are none, and those without an answer:
    some brokers hang up instead.
    """
    asked: dict[int, str] = {}
    refused: list[str] = []

    def answered(_client: paho.Client, _data: object, mid: int, codes: list[ReasonCode], _given: object) -> None:
        name = asked.pop(mid)
        refused.extend(f"{name} ({code})" for code in codes if code.is_failure)

    client.on_subscribe = answered
    for name in filters:
        if name.startswith(SHARED) and not reply.has_shared_subscriptions:
            refused.append(f"{name} (no shared subscriptions)")
            continue
        try:
            _, mid = client.subscribe(_unshared(name))
        except ValueError as error:
            refused.append(f"{name} ({error})")
            continue
        if mid is None:  # the connection has ended
            refused.append(f"{name} ({NO_ANSWER})")
        else:
            asked[mid] = name
    _turn(client, lambda: not asked)
    return (*refused, *(f"{name} ({NO_ANSWER})" for name in asked.values()))


def _unshared(name: str) -> str:
    """The filter without ``$share/GROUP/``: a member of the group would be dealt the questions of the fleet."""
    return name.split("/", 2)[2] if name.startswith(SHARED) else name


def _turn(client: paho.Client, is_over: Callable[[], bool]) -> None:
    until = time.monotonic() + ANSWER_SECONDS
    while not is_over() and time.monotonic() < until:
        if client.loop(STEP_SECONDS) != MQTTErrorCode.MQTT_ERR_SUCCESS:
            break


def _client(settings: Mqtt, version: str) -> paho.Client:
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=f"{settings.client_id}-doctor",
        protocol=MQTTProtocolVersion.MQTTv5 if version == "5" else MQTTProtocolVersion.MQTTv311,
        clean_session=None if version == "5" else True,
        reconnect_on_failure=False,
    )
    client.connect_timeout = ANSWER_SECONDS
    if settings.username is not None:
        client.username_pw_set(settings.username, credentials.password(settings))
    if (context := credentials.client_context(settings)) is not None:
        client.tls_set_context(context)
    return client


def _open(client: paho.Client, settings: Mqtt, version: str, session_expiry_seconds: int) -> None:
    host, port, _ = split_broker_url(settings.url)
    if version == "5":
        asked = Properties(PacketTypes.CONNECT)
        asked.SessionExpiryInterval = session_expiry_seconds
        client.connect(host, port, keepalive=settings.keepalive_seconds, clean_start=True, properties=asked)
    else:
        client.connect(host, port, keepalive=settings.keepalive_seconds)


def _leave(client: paho.Client, version: str) -> None:
    if version == "5":
        forget = Properties(PacketTypes.DISCONNECT)
        forget.SessionExpiryInterval = 0
        client.disconnect(properties=forget)
    else:
        client.disconnect()
    client.loop(STEP_SECONDS)


def _reply(version: str, code: ReasonCode, given: Any) -> Reply:
    return Reply(
        version=version,
        code=code.value if code.is_failure else 0,
        reason=str(code),
        session_expiry_seconds=getattr(given, "SessionExpiryInterval", None),
        maximum_packet_bytes=getattr(given, "MaximumPacketSize", None),
        maximum_qos=getattr(given, "MaximumQoS", 2),
        has_retain=bool(getattr(given, "RetainAvailable", 1)),
        has_shared_subscriptions=bool(getattr(given, "SharedSubscriptionAvailable", 1)),
    )


def judge_broker(facts: Broker) -> Finding:
    settings, reply = facts.settings, facts.reply
    if not settings.enabled:
        return skip("mqtt.enabled = false")
    if not facts.has_address:
        fix = "correct mqtt.url, give it the broker's address, or mend this device's name server: resolvectl status"
        return fail(f"{settings.url}: {facts.error}", fix)
    if reply is None:
        fix = "sudo systemctl enable --now mosquitto, if it is to run here; else correct mqtt.url and the [mqtt] files"
        return fail(f"{settings.url}: {facts.error}", fix)
    if reply.code:
        return _judge_refusal(settings, reply)
    return _judge_grants(settings, reply)


def _judge_refusal(settings: Mqtt, reply: Reply) -> Finding:
    if reply.code in (BAD_CREDENTIALS, NOT_AUTHORISED):
        if settings.username is None:
            what = f"{settings.url} admits nobody without a user name ({reply.reason})"
            return fail(what, "set mqtt.username and mqtt.password_file")
        what = f"{settings.url} does not accept the user '{settings.username}' with this password ({reply.reason})"
        return fail(
            what,
            "correct mqtt.username or the text in mqtt.password_file; on the broker: "
            f"sudo mosquitto_passwd /etc/mosquitto/passwd {settings.username}, then sudo systemctl reload mosquitto",
        )
    return fail(
        f"{settings.url} refuses the connection: {reply.reason}", "see the broker's log: journalctl -u mosquitto"
    )


def _judge_grants(settings: Mqtt, reply: Reply) -> Finding:
    good = ok(f"MQTT {reply.version} at {settings.url}{_kept_for(settings, reply)}")
    return next(_lacking(settings, reply), good)


def _lacking(settings: Mqtt, reply: Reply) -> Iterator[Finding]:
    """What edged would want and does not get, the worst first."""
    if reply.refused_topics:
        yield fail(
            f"{settings.url} refuses edged the topics {', '.join(reply.refused_topics)}: no messages come from them",
            f"let the broker's ACL allow {settings.username or 'anonymous clients'} to subscribe, or correct them",
        )
    if reply.maximum_qos < 1:
        yield fail(f"{settings.url} takes nothing beyond QoS 0: answers can be lost", "let the broker allow QoS 1")
    if reply.version == "5" and not settings.session_expiry_seconds:
        what = "the session ends with each connection: what arrives while edged is away is lost"
        yield warn(what, "set mqtt.session_expiry_seconds = 604800")
    granted = reply.session_expiry_seconds
    if granted is not None and granted < settings.session_expiry_seconds:
        what = f"the broker keeps the session for {granted} s, not {settings.session_expiry_seconds} s as asked"
        yield warn(what, "raise the broker's longest session expiry: what arrives after that time is lost")
    limit = reply.maximum_packet_bytes
    if limit is not None and limit < settings.max_payload_bytes:
        what = f"the broker takes packets of {limit} bytes at most: longer answers are not published"
        yield warn(what, f"set max_packet_size in mosquitto.conf to {2 * settings.max_payload_bytes} or more")
    if not reply.has_retain:
        what = "the broker keeps no retained messages: nobody sees edged's status later"
        yield warn(what, "set retain_available true in mosquitto.conf")
    if reply.version != "5" and settings.protocol == "auto":
        what = "the broker speaks MQTT 3.1.1 only: no response topics, and its own idea of how long a session lasts"
        yield warn(what, "use a broker with MQTT 5: sudo apt-get install mosquitto")


def _kept_for(settings: Mqtt, reply: Reply) -> str:
    if reply.version != "5":
        return ""
    seconds = settings.session_expiry_seconds if reply.session_expiry_seconds is None else reply.session_expiry_seconds
    limit = reply.maximum_packet_bytes
    packets = "" if limit is None else f", packets to {limit} bytes"
    return f", session kept for {seconds / 86_400:.1f} days after edged leaves{packets}"
