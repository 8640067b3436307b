"""The values the event path passes along."""

import uuid
from enum import StrEnum

import msgspec

from edged.types import Priority

_ANSWER_NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")  # RFC 9562, namespace OID


class Outcome(StrEnum):
    """How an event ended; each event gets exactly one."""

    ANSWERED = "answered"
    EXPIRED = "expired"
    REJECTED = "rejected"
    FAILED = "failed"


PATIENCE_SECONDS: dict[Priority, float] = {"alarm": 0.0, "interactive": 60.0, "batch": 600.0}
"""How long an event of a class may wait behind later ones of a higher class."""


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """A message as a door received it, before it is accepted. Times are Unix seconds.

    Without ``reply_topic`` the answer goes to ``<reply_prefix>/<id>``, the sender's or else the event's.
    ``delivery`` names this transmission; with ``redelivered`` an accepted event of the same name is the same one.
    """

    id: str | None
    source: str
    topic: str
    payload: bytes
    reply_topic: str | None
    reply_prefix: str
    correlation: bytes | None = None
    received_at: float
    answer_by: float | None = None
    expires_at: float | None = None
    priority: Priority = "interactive"
    delivery: str | None = None
    redelivered: bool = False

    @property
    def urgent_at(self) -> float:
        """The event with the smallest goes first: Unix time, seconds."""
        waits_until = self.received_at + PATIENCE_SECONDS[self.priority]
        return waits_until if self.answer_by is None else min(waits_until, self.answer_by)

    def answer_topic(self, event_id: str) -> str:
        """Where the answer to this message goes."""
        return self.reply_topic or f"{self.reply_prefix}/{self.id or event_id}"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted event, as the inbox holds it; it gives each a new ``seq``."""

    seq: int
    id: str
    source: str
    topic: str
    payload: bytes
    reply_topic: str
    correlation: bytes | None
    received_at: float
    answer_by: float | None
    expires_at: float | None

    @property
    def answer_id(self) -> str:
        """What receivers drop repetitions of its answer by."""
        return answer_id(self.id, self.seq, self.received_at)


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A message waiting to be published; ``seq`` gives the order."""

    seq: int
    topic: str
    correlation: bytes | None
    body: bytes


def new_event_id() -> str:
    return uuid.uuid4().hex


def answer_id(event_id: str, seq: int, received_at: float) -> str:
    """The id of an event's answer: the same for every delivery of it, before and after any crash.

    Another event of the same id has another: ``seq`` differs in one inbox, ``received_at`` between two.
    """
    return uuid.uuid5(_ANSWER_NAMESPACE, f"{event_id}/{seq}/{received_at!r}").hex
