"""Sensors and people outside a board, who go on whatever becomes of it, and a ledger of what it acknowledged."""

import itertools
import queue
import random
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Any

import httpx

from tests.device.tap import Tap
from tests.mqtt_client import MqttClient

OPEN_EVENTS = 12
"""Events that wait for their answers at any time; while the board is away they wait at the broker."""
GENERATED_EACH = 50
"""One event in so many is answered by the chat model: emulated it takes seconds, and durability is what counts."""
UPLOAD_SECONDS = 60.0
SUBSCRIBE_SECONDS = 300.0
RETRY_SECONDS = 0.5
LOOK_SECONDS = 0.5
ANSWER_TOPIC = "answers"
WORDS = ("valve", "pressure", "relief", "pump", "bearing", "oil", "filter", "motor", "sensor", "tank", "seal", "shaft")


class Kind(Enum):
    """What can be acknowledged."""

    ACCEPTED = "accepted"  # an event: PUBACK left the board
    ANSWERED = "answered"  # an event: its answer came to the sensor
    STORED = "stored"  # a document: its upload was answered with success


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """``name`` is the event's answer topic or the document's id; ``moment`` what :attr:`Ledger.clock` said then."""

    kind: Kind
    name: str
    moment: int


class Ledger:
    """All acknowledgements, in their order; any thread may write and wait."""

    def __init__(self) -> None:
        self.clock: Callable[[], int] = lambda: 0
        self._entries: list[Acknowledgement] = []
        self._grown = threading.Condition()

    def note(self, kind: Kind, name: str) -> None:
        with self._grown:
            self._entries.append(Acknowledgement(kind, name, self.clock()))
            self._grown.notify_all()

    def names(self, kind: Kind, *, until: int | None = None) -> set[str]:
        """Of one kind, those acknowledged at ``until`` or before."""
        with self._grown:
            return {each.name for each in self._entries if each.kind is kind and _is_by(each, until)}

    def wait_until(self, kind: Kind, count: int, *, seconds: float) -> None:
        """Return when so many different names of one kind are there.

        Raises:
            TimeoutError: they are not.
        """
        with self._grown:
            if not self._grown.wait_for(lambda: len({each.name for each in self._of(kind)}) >= count, seconds):
                found = len({each.name for each in self._of(kind)})
                raise TimeoutError(f"{found} of {count} were {kind.value} in {seconds:.0f} s")

    def _of(self, kind: Kind) -> list[Acknowledgement]:
        return [each for each in self._entries if each.kind is kind]


def _is_by(entry: Acknowledgement, moment: int | None) -> bool:
    return moment is None or entry.moment <= moment


def question(number: int) -> dict[str, Any]:
    """An event. Each third leaves it to edged to name it, so that only its transmission tells a redelivery."""
    asked: dict[str, Any] = {"query": f"At which pressure does the relief valve of pump {number % 5} open?"}
    asked |= {"max_tokens": 6} if number % GENERATED_EACH == 1 else {"deadline_ms": 1}
    return asked if number % 3 == 0 else {"id": f"e{number}", **asked}


def document(number: int, chance: random.Random) -> str:
    """A text of one to three short paragraphs; its first and its last word are in no other."""
    lengths = [chance.randrange(5, 20) for _ in range(chance.randrange(1, 4))]
    body = "\n\n".join(" ".join(chance.choices(WORDS, k=length)) + "." for length in lengths)
    return f"{first_word(number)} {body} {last_word(number)}"


def first_word(number: int) -> str:
    return f"first{number}"


def last_word(number: int) -> str:
    return f"last{number}"


class Load:
    """Publishes events and uploads documents from :meth:`start` to :meth:`stop`.

    The board has to reach its broker by ``tap_port``. ``answers`` has the different messages that came for each event,
    by answer topic; ``documents`` every text that was sent, by id.
    """

    def __init__(self, broker_port: int, ledger: Ledger, seed: int) -> None:
        self.answers: dict[str, set[bytes]] = {}
        self.documents: dict[str, str] = {}
        self.published = 0
        self.ledger = ledger
        self._chance = random.Random(seed)
        self._tap = Tap(broker_port, self._accepted)
        self._sensor = MqttClient(broker_port, "sensor", f"{ANSWER_TOPIC}/#")
        self._room = threading.Semaphore(OPEN_EVENTS)
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = threading.Thread(target=self._listen, name="answers", daemon=True)

    @property
    def tap_port(self) -> int:
        return self._tap.port

    def start(self, http_port: int, api_key: str) -> None:
        """Begin once the board is the broker's subscriber, whose session then keeps what comes while it is away."""
        assert self._tap.subscribed.wait(SUBSCRIBE_SECONDS)
        self._listener.start()
        for name, work in (("events", self._publish), ("documents", lambda: self._upload(http_port, api_key))):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def stop(self, *, answered_within_seconds: float) -> None:
        """Send nothing more, and return when every event has its answer.

        Raises:
            TimeoutError: some have none.
        """
        self._stopping.set()
        self._room.release()
        for thread in self._threads:
            thread.join(UPLOAD_SECONDS * 2)
        self.ledger.wait_until(Kind.ANSWERED, self.published, seconds=answered_within_seconds)

    def close(self) -> None:
        """End whatever of it still runs."""
        self._stopping.set()
        self._closing.set()
        self._room.release()
        with ExitStack() as ends:
            ends.callback(self._tap.close)
            ends.callback(self._sensor.__exit__)

    # --- events -----------------------------------------------------------------------------------------

    def _publish(self) -> None:
        while self._room.acquire() and not self._stopping.is_set():
            topic = f"{ANSWER_TOPIC}/{self.published}"
            self._sensor.publish("edged/query", question(self.published), response_topic=topic)
            self.published += 1

    def _accepted(self, message: bytes) -> None:
        topic = re.search(rb"answers/\d+", message)
        assert topic is not None
        self.ledger.note(Kind.ACCEPTED, topic.group().decode())

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                message = self._sensor.messages.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            bodies = self.answers.setdefault(message.topic, set())
            bodies.add(bytes(message.payload))
            if message.topic not in self.ledger.names(Kind.ANSWERED):
                self.ledger.note(Kind.ANSWERED, message.topic)
                self._room.release()

    # --- documents --------------------------------------------------------------------------------------

    def _upload(self, port: int, api_key: str) -> None:
        headers = {"X-API-Key": api_key}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False) as client:
            for number in itertools.count():
                if self._stopping.is_set():
                    return
                if self._is_stored(client, f"d{number}", document(number, self._chance)):
                    self.ledger.note(Kind.STORED, f"d{number}")
                else:
                    self._stopping.wait(RETRY_SECONDS)

    def _is_stored(self, client: httpx.Client, name: str, text: str) -> bool:
        self.documents[name] = text
        try:
            answer = client.post("/v1/documents", json={"id": name, "text": text}, timeout=UPLOAD_SECONDS)
        except httpx.TransportError:  # the power went
            return False
        return answer.is_success
