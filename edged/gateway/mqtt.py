"""The MQTT door: questions and sensor values in, answers out, status retained.

A message is acknowledged to the broker only after the inbox has it on disk. Each connection is a client object of
its own: what was in flight when it ended is the outbox's to send again and the broker's to deliver again.
"""

import asyncio
import functools
import random
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import structlog

from edged.config import Mqtt
from edged.errors import EdgedError, IdReusedError, PayloadTooLargeError, RequestError
from edged.events.admission import Admission
from edged.events.event import Event, Incoming, Outgoing
from edged.events.inbox import Accepted, Inbox
from edged.events.outbox import DisconnectedError, PublishRefusedError
from edged.events.trigger import TopicRule, question_from_value, rule_for
from edged.gateway.mqtt_connection import VERSIONS, Connected, Connection, Message, NoAnswerError
from edged.gateway.wire import QueryRequest, answer_body, encode, error_body, id_of, parse_query
from edged.runtime.backoff import pause_seconds
from edged.runtime.health import MQTT_DOWN, MQTT_SUBSCRIBE_REFUSED, STORE_FAILING, Health
from edged.topics import matches
from edged.types import Answer, Delta, Question, Restarted

STEADY_SECONDS = 10.0
"""A connection that lasted so long counts as a success; one that did not may be the same that a failed one is."""
SHORT_CONNECTIONS = 3
"""After so many in a row that did not last, somebody else may have this client's name: a broker then ends the older
connection (MQTT 5.0, section 3.1.4), and not every one says why."""
SUBSCRIBE_AGAIN_SECONDS = 60.0
SESSION_KEY = "mqtt_session"
FILTERS_KEY = "mqtt_filters"


class MqttGateway:
    """Keeps a connection to the broker. :meth:`run` is one supervised service."""

    def __init__(
        self,
        settings: Mqtt,
        inbox: Inbox,
        health: Health,
        *,
        rules: Sequence[TopicRule],
        admission: Admission,
        on_accepted: Callable[[Accepted], None],
        status: Callable[[], dict[str, object]],
        farewell: dict[str, object],
    ) -> None:
        """``status`` makes the retained status; ``farewell`` is what it is when this is gone, also by the last will."""
        self._settings = settings
        self._inbox = inbox
        self._health = health
        self._rules = tuple(rules)
        self._admission = admission
        self._on_accepted = on_accepted
        self._status = status
        self._farewell_body = encode(farewell)
        self._version = VERSIONS["5" if settings.protocol == "auto" else settings.protocol]
        self._connection: Connection | None = None
        self._is_connected = asyncio.Event()
        self._accepting: set[asyncio.Task[None]] = set()
        self._retained: dict[str, bytes] = {}
        self._refused: dict[str, str] = {}
        self._log = structlog.get_logger("mqtt")

    # --- what the outbox and the status need -----------------------------------------------------------

    async def connected(self) -> None:
        """Return once there is a connection."""
        await self._is_connected.wait()

    @property
    def protocol(self) -> str | None:
        """``5`` or ``3.1.1`` while connected."""
        return self._connection.version_name if self._connection is not None else None

    async def publish(self, message: Outgoing) -> None:
        """See :class:`edged.events.outbox.Publisher`."""
        if self._connection is None:
            raise DisconnectedError("not connected")
        await self._connection.publish(message.topic, message.body, correlation=message.correlation)

    def progress(self, event: Event, item: Delta | Restarted) -> None:
        """Show the next piece of a growing answer to whoever listens; only the finished answer is guaranteed."""
        if self._connection is not None:
            self._connection.show(f"{event.reply_topic}/stream", piece_message(item))

    def status_changed(self) -> None:
        """Publish the retained status again; call it on the event loop."""
        if self._connection is not None:
            self._own(self._publish_status(self._connection), "mqtt-status")

    def retain(self, topic: str, body: bytes) -> None:
        """Publish a retained message now, and again on every new connection; call it on the event loop."""
        self._retained[topic] = body
        if self._connection is not None:
            self._own(self._publish_retained(self._connection, topic, body), "mqtt-retained")

    def use_rules(self, rules: Sequence[TopicRule]) -> None:
        """Ask by these rules from now on, and listen to their topics; call it on the event loop."""
        before, self._rules = self._filters(), tuple(rules)
        if self._connection is not None:
            self._connection.unsubscribe([name for name in before if name not in self._filters()])
            self._connection.subscribe(self._filters())
            self._own(self._remember_filters(), "mqtt-filters")
        self._show_refused()

    def _filters(self) -> list[str]:
        return [self._settings.query_topic, *(rule.filter for rule in self._rules)]

    # --- subscriptions ---------------------------------------------------------------------------------

    def _subscribed(self, name: str, refused: str | None) -> None:
        if refused is None:
            self._refused.pop(name, None)
        else:
            self._refused[name] = refused
        self._show_refused()

    def _show_refused(self) -> None:
        refused = [f"{name} ({self._refused[name]})" for name in self._filters() if name in self._refused]
        if refused:
            self._health.set(MQTT_SUBSCRIBE_REFUSED, f"no messages come from {', '.join(refused)}")
        else:
            self._health.clear(MQTT_SUBSCRIBE_REFUSED)

    async def _insist(self, connection: Connection) -> None:
        """Ask for what was refused again and again: whoever mends the broker's rules does not tell edged."""
        while not connection.ended.done():
            await asyncio.wait([connection.ended], timeout=SUBSCRIBE_AGAIN_SECONDS)
            if not connection.ended.done():
                connection.subscribe([name for name in self._filters() if name in self._refused])

    # --- the connection --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, serve, reconnect with jitter, until cancelled."""
        failures = short = 0
        while True:
            reason, served_seconds = await self._serve_once()
            failures = 1 if served_seconds >= STEADY_SECONDS else failures + 1
            short = short + 1 if 0 < served_seconds < STEADY_SECONDS else 0
            if short >= SHORT_CONNECTIONS:
                reason += (
                    f"; {short} connections ended within seconds: is another client named {self._settings.client_id}?"
                )
            self._health.set(MQTT_DOWN, f"{self._settings.url}: {reason}")
            pause = pause_seconds(
                failures,
                smallest=self._settings.reconnect_min_seconds,
                largest=self._settings.reconnect_max_seconds,
                random=random.random(),  # noqa: S311 - jitter, no secret
            )
            self._log.warning("mqtt_disconnected", reason=reason, retry_seconds=round(pause, 2))
            await asyncio.sleep(pause)

    async def _serve_once(self) -> tuple[str, float]:
        """One connection from beginning to end; returns why it ended and for how many seconds it served."""
        connection = Connection(
            self._settings, self._version, self._received, self._subscribed, will=self._farewell_body
        )
        try:
            answer = await connection.open()
            if answer.wrong_version:
                return self._other_version("the broker does not speak this version"), 0.0
            if answer.refused is not None:
                return f"the broker refused the connection: {answer.refused}", 0.0
            await self._begin(connection, answer)
            began = time.monotonic()
            return await asyncio.shield(connection.ended), time.monotonic() - began
        except NoAnswerError as error:
            return self._other_version(str(error)), 0.0
        except OSError as error:
            return str(error), 0.0
        except EdgedError as error:  # files of the configuration, or a store that cannot remember the session
            return error.message, 0.0
        finally:
            self._connection = None
            self._is_connected.clear()
            await asyncio.shield(self._farewell(connection))

    def _other_version(self, reason: str) -> str:
        """Try the other version next: some brokers refuse MQTT 5, some hang up on it, some only stay silent."""
        if self._settings.protocol != "auto":
            return reason
        tried, other = ("5", "3.1.1") if self._version == VERSIONS["5"] else ("3.1.1", "5")
        self._version = VERSIONS[other]
        return f"{reason} (MQTT {tried}; trying {other})"

    async def _begin(self, connection: Connection, answer: Connected) -> None:
        session = await self._session_name(present=answer.session_present)
        if not connection.session.done():
            connection.session.set_result(session)
        await self._leave_behind(connection)
        self._connection = connection
        connection.subscribe(self._filters())
        self._own(self._insist(connection), "mqtt-insist")
        self._health.clear(MQTT_DOWN)
        self._is_connected.set()
        self.status_changed()
        for topic, body in self._retained.items():
            self._own(self._publish_retained(connection, topic, body), "mqtt-retained")
        self._log.info("mqtt_connected", protocol=connection.version_name, session_present=answer.session_present)

    async def _farewell(self, connection: Connection) -> None:
        """Leave an honest retained status: a clean goodbye does not trigger the last will."""
        if not connection.ended.done():
            try:
                async with asyncio.timeout(1.0):
                    await connection.publish(self._settings.status_topic, self._farewell_body, retain=True)
            except (TimeoutError, DisconnectedError, PublishRefusedError) as error:
                self._log.debug("mqtt_farewell_failed", error=str(error))
        await connection.close()

    async def _session_name(self, *, present: bool) -> str:
        """A name for the broker's session: packet ids mean something only within one."""
        known = await self._inbox.remembered(SESSION_KEY)
        if present and known is not None:
            return known
        name = uuid.uuid4().hex
        await self._inbox.remember(SESSION_KEY, name)
        return name

    async def _leave_behind(self, connection: Connection) -> None:
        """The broker's session outlives the configuration: end its subscriptions that nobody asks for any more."""
        known = await self._inbox.remembered(FILTERS_KEY)
        before = msgspec.json.decode(known, type=list[str]) if known else []
        connection.unsubscribe([name for name in before if name not in self._filters()])
        if before != self._filters():
            await self._remember_filters()

    async def _remember_filters(self) -> None:
        try:
            await self._inbox.remember(FILTERS_KEY, encode(self._filters()).decode())
        except EdgedError as error:  # it only saves the broker messages that are dropped here
            self._log.warning("mqtt_filters_not_remembered", code=error.code, error=error.message)

    async def _publish_status(self, connection: Connection) -> None:
        await self._publish_retained(connection, self._settings.status_topic, encode(self._status()))

    async def _publish_retained(self, connection: Connection, topic: str, body: bytes) -> None:
        try:
            await connection.publish(topic, body, retain=True)
        except (DisconnectedError, PublishRefusedError) as error:
            self._log.debug("mqtt_state_not_published", topic=topic, error=str(error))

    # --- messages --------------------------------------------------------------------------------------

    def _received(self, connection: Connection, message: Message) -> None:
        # Tasks start in the order of their creation, and each reaches the inbox's queue before it first waits:
        # events keep the order of their arrival.
        self._own(self._accept(connection, message), "mqtt-accept")

    def _own(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._accepting.add(task)
        task.add_done_callback(self._disown)

    def _disown(self, task: asyncio.Task[None]) -> None:
        self._accepting.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("mqtt_task_failed", task=task.get_name(), exc_info=task.exception())

    async def _accept(self, connection: Connection, message: Message) -> None:
        """Accept, then acknowledge. Without an acknowledgement the broker keeps the message for us."""
        if message.retained:
            self._log.debug("event_dropped", topic=message.topic, reason="it is a retained value from before")
            connection.acknowledge(message)
            return
        if not self._listens_to(message.topic):  # the broker had it, or a subscription to it, from before a change
            reason = "neither mqtt.query_topic nor events.topics takes it in any more"
            self._log.warning("event_dropped", topic=message.topic, reason=reason)
            connection.acknowledge(message)
            return
        if self._admission.is_full:
            if message.qos == 0:
                self._log.warning("event_dropped", topic=message.topic, reason="the inbox is full and QoS is 0")
                return
            await self._admission.room()
        # What the broker kept comes before the session has its name, by which a later redelivery is recognised.
        session = await connection.session
        incoming, refusal = self._read(message, session)
        try:
            accepted = await self._store(incoming, refusal)
        except EdgedError as error:
            self._log.error("event_not_accepted", topic=message.topic, code=error.code, error=error.message)
            self._health.set(STORE_FAILING, f"an event could not be stored: {error.message}")
            # The broker delivers an unacknowledged message again only on a new connection.
            connection.abandon("an event could not be stored")
            return
        self._health.clear(STORE_FAILING)
        connection.acknowledge(message)
        self._on_accepted(accepted)

    async def _store(self, incoming: Incoming, refusal: RequestError | None) -> Accepted:
        """Durably accept or refuse. Raises :class:`StoreError` or :class:`DiskFullError`."""
        if refusal is None:
            accepted = await self._inbox.accept(incoming)
            if accepted.status != "reused":
                return accepted
            refusal = IdReusedError(f"the id '{incoming.id}' is that of another event, whose answer is not out yet")
        return await self._inbox.reject(incoming, functools.partial(error_message, error=refusal))

    def _read(self, message: Message, session: str) -> tuple[Incoming, RequestError | None]:
        """The event in a message; with the error that closes it at once, when there is one."""
        now = time.time()
        limit = self._settings.max_payload_bytes
        payload = message.payload
        request: QueryRequest | None = None
        refusal: RequestError | None = None
        event_id: str | None = None
        rule = self._rule(message.topic)
        if len(payload) > limit:
            refusal = PayloadTooLargeError(
                f"the payload has {len(payload)} bytes", hint=f"send at most {limit} (mqtt.max_payload_bytes)"
            )
            payload = b""
        elif rule is None:
            try:
                request = parse_query(payload)
                event_id = request.id
            except RequestError as error:
                refusal, event_id = error, id_of(payload)
        deadline_ms = request.deadline_ms if request else rule.deadline_ms if rule else None
        expires_s = request.expires_s if request else rule.expires_s if rule else None
        incoming = Incoming(
            id=event_id,
            source="mqtt",
            topic=message.topic,
            payload=payload,
            reply_topic=message.reply_topic,
            reply_prefix=self._settings.answer_prefix,
            correlation=message.correlation,
            received_at=now,
            answer_by=None if deadline_ms is None else now + deadline_ms / 1e3,
            expires_at=None if expires_s is None else now + expires_s,
            priority=request.priority if request else rule.priority if rule else "interactive",
            delivery=message.delivery(session),
            redelivered=message.dup,
        )
        return incoming, refusal

    def _listens_to(self, topic: str) -> bool:
        return any(matches(name, topic) for name in self._filters())

    def _rule(self, topic: str) -> TopicRule | None:
        return None if matches(self._settings.query_topic, topic) else rule_for(topic, self._rules)

    def decide(self, event: Event) -> Question:
        """The question of an accepted event. Raises :class:`RequestError`."""
        rule = self._rule(event.topic)
        if rule is not None:
            return question_from_value(rule, event.topic, event.payload)
        if not self._listens_to(event.topic) and not event.payload.lstrip().startswith(b"{"):
            raise RequestError(  # it would be asked as if the value were a question
                f"nothing asks about {event.topic} any more",
                hint="its filter left events.topics after the value was accepted; send it again if there is one anew",
            )
        return parse_query(event.payload).question()


class Rendering:
    """Answers and errors as the senders of events see them."""

    def answer(self, event: Event, answer: Answer) -> bytes:
        return encode({**answer_body(event.id, answer), "answer_id": event.answer_id})

    def error(self, event: Event, error: EdgedError) -> bytes:
        return error_message(event.id, event.answer_id, error)


def error_message(event_id: str, answer_id: str, error: EdgedError) -> bytes:
    """The message of an event that got no answer; receivers drop repetitions by ``answer_id``."""
    return encode({**error_body(event_id, error), "answer_id": answer_id})


def piece_message(item: Delta | Restarted) -> bytes:
    """The message of a piece of a growing answer."""
    return encode({"delta": item.text} if isinstance(item, Delta) else {"restarted": item.reason})
