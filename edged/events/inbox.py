"""events.db: what was accepted, how it ended, what is still to be published. The only module that knows its SQL.

Accepting is one durable transaction; closing is one that stores outcome, answer and outgoing message together.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from edged.events.event import Event, Incoming, Outcome, Outgoing, answer_id, new_event_id
from edged.events.repetition import Earlier, Verdict, is_repeated, judge
from edged.store.database import Database

REDELIVERY_WINDOW_EVENTS = 4096
PRUNE_BATCH_EVENTS = 500
NEWEST = 2**63 - 1

_EVENT_COLUMNS = "seq, id, source, topic, payload, reply_topic, correlation, received_at, answer_by, expires_at"


class Accepted(msgspec.Struct, frozen=True):
    """What became of a message.

    ``new``: it will be worked on. ``open``: it already is. ``closed``: its stored answer goes out again.
    ``rejected``: it was closed at once, with an error as its answer. ``reused``: nothing was stored, because its id is
    still another event's.
    """

    id: str
    status: Literal["new", "open", "closed", "rejected", "reused"]


class _Error(msgspec.Struct, frozen=True):
    retryable: bool


class _Failed(msgspec.Struct, frozen=True):
    """Of a stored error what its receiver was told of another try."""

    error: _Error


class Inbox:
    """Owner of events.db."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, path: Path) -> "Inbox":
        return cls(await Database.open(path, resources.files("edged.events") / "migrations"))

    @property
    def database(self) -> Database:
        """events.db itself, for what else is kept in it."""
        return self._database

    async def close(self) -> None:
        await self._database.close()

    async def accept(self, incoming: Incoming) -> Accepted:
        """Write an event durably, or recognise one that was accepted before. Raises :class:`StoreError`."""
        return await self._database.write(lambda connection: _accept(connection, incoming))

    async def reject(self, incoming: Incoming, body: Callable[[str, str], bytes]) -> Accepted:
        """Accept an event and close it at once as rejected; ``body`` makes its answer from its id and the answer's.

        Where another event has its id, that one stays as it is, and this one is kept under a name of its own.
        """
        return await self._database.write(lambda connection: _reject(connection, incoming, body))

    async def open_events(self, limit: int, leave_out: Iterable[str] = ()) -> list[Event]:
        """The most urgent open events: by class and age, or sooner where their deadline is."""
        busy = list(leave_out)
        query = (
            f"SELECT {_EVENT_COLUMNS} FROM events WHERE outcome IS NULL"  # noqa: S608 - constants and marks only
            f" AND id NOT IN ({','.join('?' * len(busy))}) ORDER BY urgent_at, seq LIMIT ?"
        )

        def work(connection: sqlite3.Connection) -> list[Event]:
            return [_event(row) for row in connection.execute(query, (*busy, limit))]

        return await self._database.read(work)

    async def close_event(self, event_id: str, outcome: Outcome, body: bytes) -> bool:
        """Give an event its outcome, store its answer and queue it for publishing, in one transaction.

        False when it had an outcome already: then nothing changes.
        """
        return await self._database.write(lambda connection: _close(connection, event_id, outcome, body, time.time()))

    async def answer(self, event_id: str) -> bytes | None:
        """The stored answer of a closed event."""

        def work(connection: sqlite3.Connection) -> bytes | None:
            row = connection.execute("SELECT body FROM answers WHERE event_id = ?", (event_id,)).fetchone()
            return None if row is None else row[0]

        return await self._database.read(work)

    async def outgoing(
        self, limit: int, *, after: int = 0, until: int = NEWEST, leave_out: Iterable[int] = ()
    ) -> list[Outgoing]:
        """The oldest messages not yet acknowledged, in order: those whose ``seq`` is after one and up to another."""
        known = list(leave_out)
        query = (
            "SELECT seq, topic, correlation, body FROM outbox"  # noqa: S608 - constants and marks only
            f" WHERE seq > ? AND seq <= ? AND seq NOT IN ({','.join('?' * len(known))}) ORDER BY seq LIMIT ?"
        )

        def work(connection: sqlite3.Connection) -> list[Outgoing]:
            rows = connection.execute(query, (after, until, *known, limit))
            return [Outgoing(seq=row[0], topic=row[1], correlation=row[2], body=row[3]) for row in rows]

        return await self._database.read(work)

    async def published(self, seq: int) -> None:
        """A message was acknowledged by the broker."""
        await self._database.write(lambda connection: connection.execute("DELETE FROM outbox WHERE seq = ?", (seq,)))

    async def give_up(self, *, created_before: float, until: int, leave_out: Iterable[int]) -> list[str]:
        """Forget the messages up to a ``seq`` that are older than a Unix time; returns their topics.

        Works in small transactions, as :meth:`prune` does.
        """
        known, topics = list(leave_out), list[str]()
        query = (
            "DELETE FROM outbox WHERE seq IN (SELECT seq FROM outbox"  # noqa: S608 - constants and marks only
            f" WHERE created_at < ? AND seq <= ? AND seq NOT IN ({','.join('?' * len(known))}) LIMIT ?) RETURNING topic"
        )

        def work(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(query, (created_before, until, *known, PRUNE_BATCH_EVENTS))
            return [topic for (topic,) in rows]

        while gone := await self._database.write(work):
            topics += gone
        return topics

    async def counts(self) -> dict[str, int]:
        """Events by outcome, ``open`` for those without one, and ``outbox``."""

        def work(connection: sqlite3.Connection) -> dict[str, int]:
            rows = connection.execute("SELECT coalesce(outcome, 'open'), count(*) FROM events GROUP BY outcome")
            found: dict[str, int] = dict(rows.fetchall())
            (waiting,) = connection.execute("SELECT count(*) FROM outbox").fetchone()
            return {"open": 0, **found, "outbox": waiting}

        return await self._database.read(work)

    async def open_count(self) -> int:
        def work(connection: sqlite3.Connection) -> int:
            (count,) = connection.execute("SELECT count(*) FROM events WHERE outcome IS NULL").fetchone()
            return int(count)

        return await self._database.read(work)

    async def remembered(self, key: str) -> str | None:
        """A small value kept across restarts."""

        def work(connection: sqlite3.Connection) -> str | None:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
            return None if row is None else row[0]

        return await self._database.read(work)

    async def remember(self, key: str, value: str) -> None:
        await self._database.write(
            lambda connection: connection.execute(
                "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (key, value),
            )
        )

    async def prune(self, *, closed_before: float, keep_bytes: int) -> int:
        """Forget closed, published events older than a Unix time, and the oldest beyond ``keep_bytes``.

        Returns how many went. Works in small transactions so that accepts do not wait behind it.
        """
        total = 0
        while True:
            gone = await self._database.write(lambda connection: _prune(connection, closed_before, keep_bytes))
            total += gone
            if gone < PRUNE_BATCH_EVENTS:
                return total


def _accept(connection: sqlite3.Connection, incoming: Incoming) -> Accepted:
    known = _redelivered(connection, incoming)
    if known is not None:
        return _repeat(connection, known, incoming)
    earlier = _earlier(connection, incoming)
    verdict = Verdict.ANEW if earlier is None else judge(earlier, incoming)
    event_id = incoming.id or new_event_id()
    if verdict is Verdict.REUSED:
        return Accepted(event_id, "reused")
    if verdict is Verdict.REPEATED:
        return _repeat(connection, event_id, incoming)
    if earlier is not None:
        connection.execute("DELETE FROM events WHERE id = ?", (event_id,))  # with its answer, which is out
    _insert(connection, event_id, incoming)
    return Accepted(event_id, "new")


def _reject(connection: sqlite3.Connection, incoming: Incoming, body: Callable[[str, str], bytes]) -> Accepted:
    known = _redelivered(connection, incoming)
    earlier = _earlier(connection, incoming)
    if known is None and earlier is not None and is_repeated(earlier, incoming):
        known = incoming.id
    if known is not None:
        return _repeat(connection, known, incoming)
    event_id = incoming.id if incoming.id and earlier is None else new_event_id()
    seq = _insert(connection, event_id, incoming)
    told = body(incoming.id or event_id, answer_id(event_id, seq, incoming.received_at))
    _close(connection, event_id, Outcome.REJECTED, told, time.time())
    return Accepted(event_id, "rejected")


def _insert(connection: sqlite3.Connection, event_id: str, incoming: Incoming) -> int:
    (seq,) = connection.execute(
        f"INSERT INTO events ({_EVENT_COLUMNS}, delivery, urgent_at)"  # noqa: S608 - constants only
        " VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING seq",
        (
            event_id,
            incoming.source,
            incoming.topic,
            incoming.payload,
            incoming.answer_topic(event_id),
            incoming.correlation,
            incoming.received_at,
            incoming.answer_by,
            incoming.expires_at,
            incoming.delivery,
            incoming.urgent_at,
        ),
    ).fetchone()
    return int(seq)


def _redelivered(connection: sqlite3.Connection, incoming: Incoming) -> str | None:
    """The event that came by the same transmission: the broker did not see it acknowledged."""
    if incoming.delivery is None or not incoming.redelivered:
        return None
    # Packet ids are used again after 65,535 messages, so only recent events can be meant.
    row = connection.execute(
        "SELECT id FROM events WHERE delivery = ? AND seq > (SELECT max(seq) FROM events) - ?"
        " ORDER BY seq DESC LIMIT 1",
        (incoming.delivery, REDELIVERY_WINDOW_EVENTS),
    ).fetchone()
    return None if row is None else str(row[0])


def _earlier(connection: sqlite3.Connection, incoming: Incoming) -> Earlier | None:
    """The event that has the message's id."""
    row = connection.execute(
        "SELECT source, topic, payload, outcome, body, EXISTS (SELECT 1 FROM outbox WHERE outbox.event_id = events.id)"
        " FROM events LEFT JOIN answers ON answers.event_id = events.id WHERE events.id = ?",
        (incoming.id,),
    ).fetchone()
    if row is None:
        return None
    source, topic, payload, outcome, body, waits = row
    return Earlier(
        source=source,
        topic=topic,
        payload=payload,
        is_open=outcome is None,
        is_lasting=outcome is not None and _is_lasting(Outcome(outcome), body),
        is_published=not waits,
    )


def _is_lasting(outcome: Outcome, body: bytes) -> bool:
    if outcome is Outcome.FAILED:
        return not msgspec.json.decode(body, type=_Failed).error.retryable
    return outcome is not Outcome.EXPIRED


def _repeat(connection: sqlite3.Connection, event_id: str, incoming: Incoming) -> Accepted:
    """What has an answer sends it again, to where this message wants it."""
    published = connection.execute(
        "INSERT INTO outbox (event_id, topic, correlation, body, created_at)"
        " SELECT event_id, ?, ?, body, ? FROM answers WHERE event_id = ?",
        (incoming.answer_topic(event_id), incoming.correlation, incoming.received_at, event_id),
    )
    return Accepted(event_id, "closed" if published.rowcount else "open")


def _close(connection: sqlite3.Connection, event_id: str, outcome: Outcome, body: bytes, now: float) -> bool:
    closed = connection.execute(
        "UPDATE events SET outcome = ?, closed_at = ? WHERE id = ? AND outcome IS NULL RETURNING seq, received_at",
        (outcome.value, now, event_id),
    ).fetchone()
    if closed is None:
        return False
    connection.execute(
        "INSERT INTO answers (id, event_id, body, created_at) VALUES (?, ?, ?, ?)",
        (answer_id(event_id, *closed), event_id, body, now),
    )
    connection.execute(
        "INSERT INTO outbox (event_id, topic, correlation, body, created_at)"
        " SELECT id, reply_topic, correlation, ?, ? FROM events WHERE id = ?",
        (body, now, event_id),
    )
    return True


def _prune(connection: sqlite3.Connection, closed_before: float, keep_bytes: int) -> int:
    rows = connection.execute(
        "SELECT id FROM ("
        " SELECT events.id, events.closed_at,"
        "  sum(length(payload) + length(body)) OVER (ORDER BY events.closed_at DESC, events.seq DESC) AS held"
        " FROM events JOIN answers ON answers.event_id = events.id"
        " WHERE NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.event_id = events.id))"
        " WHERE closed_at < ? OR held > ? ORDER BY closed_at LIMIT ?",
        (closed_before, keep_bytes, PRUNE_BATCH_EVENTS),
    ).fetchall()
    connection.executemany("DELETE FROM events WHERE id = ?", rows)
    return len(rows)


def _event(row: Sequence[object]) -> Event:
    names = [name.strip() for name in _EVENT_COLUMNS.split(",")]
    return msgspec.convert(dict(zip(names, row, strict=True)), Event, strict=False)
