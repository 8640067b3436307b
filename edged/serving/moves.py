"""Which models were activated, how each rollout went and every move, in events.db. The only module that knows this SQL.

See edged/events/migrations/0002_model_moves.sql.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from edged.models.rollout import Move, Role, Stage
from edged.store.database import Database

KEEP_ROLLOUTS = 500
KEEP_MOVES = 5_000

Outcome = Literal["promoted", "unchanged", "refused", "rolled_back", "interrupted"]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The model that was activated for a role, what the configuration named then, and the one before it."""

    model: str
    configured: str
    previous: str | None


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout as it is remembered; times are Unix times in seconds. ``outcome`` is None while it goes on."""

    id: int
    role: Role
    model: str
    started_at: float
    ended_at: float | None
    outcome: Outcome | None
    reason: str
    evidence: dict[str, Any]


class PastMove(msgspec.Struct, frozen=True, kw_only=True):
    """A move as it is remembered."""

    role: Role
    model: str
    old: str | None
    new: str
    reason: str
    moved_at: float
    rollout_id: int | None


class Journal:
    """Every method is one transaction, durable when it returns, and raises :class:`StoreError`."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        """``database`` is events.db; ``clock`` gives Unix time in seconds."""
        self._database = database
        self._clock = clock

    async def begin(self, role: Role, model: str, options: dict[str, object]) -> int:
        """A rollout starts; its id."""

        def work(connection: sqlite3.Connection) -> int:
            _forget_old(connection)
            row = connection.execute(
                "INSERT INTO model_rollouts (role, model, options, started_at) VALUES (?, ?, ?, ?)",
                (role, model, json.dumps(options), self._clock()),
            )
            assert row.lastrowid is not None
            return row.lastrowid

        return await self._database.write(work)

    async def end(self, rollout_id: int, outcome: Outcome, reason: str, evidence: dict[str, Any]) -> None:
        """A rollout is over."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE model_rollouts SET ended_at = ?, outcome = ?, reason = ?, evidence = ? WHERE id = ?",
                (self._clock(), outcome, reason, json.dumps(evidence), rollout_id),
            )

        await self._database.write(work)

    async def interrupted(self) -> None:
        """No rollout goes on: those without an end were cut short with the daemon, some after their success."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "UPDATE model_rollouts SET ended_at = ?, reason = 'the daemon ended in the middle', outcome ="
                " CASE WHEN EXISTS (SELECT 1 FROM model_moves AS m WHERE m.rollout_id = model_rollouts.id"
                " AND m.new = 'active' AND m.model LIKE model_rollouts.model || '@%')"
                " THEN 'promoted' ELSE 'interrupted' END WHERE outcome IS NULL",
                (self._clock(),),
            )

        await self._database.write(work)

    async def moved(
        self,
        role: Role,
        moves: Sequence[Move],
        reason: str,
        *,
        rollout_id: int | None = None,
        choice: Choice | None = None,
    ) -> None:
        """Steps that were taken together, with what is to be served from now on where that changed."""

        def work(connection: sqlite3.Connection) -> None:
            now = self._clock()
            connection.executemany(
                "INSERT INTO model_moves (rollout_id, role, model, old, new, reason, moved_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (rollout_id, role, move.model, move.old.value if move.old else None, move.new.value, reason, now)
                    for move in moves
                ],
            )
            if choice is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO model_choices (role, model, configured, previous, chosen_at)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (role, choice.model, choice.configured, choice.previous, now),
                )

        await self._database.write(work)

    async def choice(self, role: Role) -> Choice | None:
        """What was activated last for a role, if anything ever was."""

        def work(connection: sqlite3.Connection) -> Choice | None:
            row = connection.execute(
                "SELECT model, configured, previous FROM model_choices WHERE role = ?", (role,)
            ).fetchone()
            return None if row is None else Choice(model=row[0], configured=row[1], previous=row[2])

        return await self._database.read(work)

    async def lineup(self, role: Role) -> dict[str, Stage]:
        """Where each model of a role was last; the retired are left out."""

        def work(connection: sqlite3.Connection) -> dict[str, Stage]:
            rows = connection.execute(
                "SELECT model, new FROM model_moves WHERE seq IN"
                " (SELECT max(seq) FROM model_moves WHERE role = ? GROUP BY model) ORDER BY seq",
                (role,),
            )
            return {model: Stage(stage) for model, stage in rows if stage != Stage.RETIRED.value}

        return await self._database.read(work)

    async def rollouts(self, limit: int) -> list[Past]:
        """The latest rollouts, newest first."""
        return await self._database.read(lambda connection: _past(connection, "", (limit,)))

    async def rollout(self, rollout_id: int) -> Past | None:
        """One rollout, or None when it is unknown."""
        found = await self._database.read(lambda connection: _past(connection, "WHERE id = ?", (rollout_id, 1)))
        return found[0] if found else None

    async def moves(self, limit: int) -> list[PastMove]:
        """The latest moves, newest first."""

        def work(connection: sqlite3.Connection) -> list[PastMove]:
            rows = connection.execute(
                "SELECT role, model, old, new, reason, moved_at, rollout_id FROM model_moves ORDER BY seq DESC LIMIT ?",
                (limit,),
            )
            return [
                PastMove(
                    role=row[0], model=row[1], old=row[2], new=row[3], reason=row[4], moved_at=row[5], rollout_id=row[6]
                )
                for row in rows
            ]

        return await self._database.read(work)


def _past(connection: sqlite3.Connection, condition: str, values: tuple[int, ...]) -> list[Past]:
    rows = connection.execute(
        "SELECT id, role, model, started_at, ended_at, outcome, reason, evidence"  # noqa: S608 - the condition is ours
        f" FROM model_rollouts {condition} ORDER BY id DESC LIMIT ?",
        values,
    )
    return [
        Past(
            id=row[0],
            role=row[1],
            model=row[2],
            started_at=row[3],
            ended_at=row[4],
            outcome=row[5],
            reason=row[6],
            evidence=json.loads(row[7]),
        )
        for row in rows
    ]


def _forget_old(connection: sqlite3.Connection) -> None:
    """Keep the latest; the last move of a model that is not retired stays, however old."""
    connection.execute(
        "DELETE FROM model_moves WHERE seq <= (SELECT max(seq) FROM model_moves) - ?"
        " AND seq NOT IN (SELECT max(seq) FROM model_moves GROUP BY role, model)",
        (KEEP_MOVES,),
    )
    connection.execute(
        "DELETE FROM model_rollouts WHERE id <= (SELECT max(id) FROM model_rollouts) - ?", (KEEP_ROLLOUTS,)
    )
