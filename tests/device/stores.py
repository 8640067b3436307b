"""Copies of a board's two databases, read with nothing of edged's: what is in them, and what is wrong with them."""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

HOME = "/var/lib/edged"
DATABASES = ("events.db", "knowledge.db")
FILES = tuple(name + suffix for name in DATABASES for suffix in ("", "-wal"))
SOUND = "PRAGMA integrity_check; PRAGMA foreign_key_check"
"""Prints ``ok`` and nothing else for a database that is whole."""


class Stores:
    """The files of ``folder``. Opening them first brings in what their write-ahead logs hold, as edged does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def flaws(self) -> list[str]:
        """What SQLite finds wrong, and chunks that a search by words or by vectors would miss."""
        found = [flaw for name in DATABASES for flaw in self._flaws(name)]
        with self._open("knowledge.db") as knowledge:
            knowledge.execute("INSERT INTO chunks_fts (chunks_fts) VALUES ('integrity-check')")
            chunks, entries, vectors = (
                {row[0] for row in knowledge.execute(query)}
                for query in ("SELECT id FROM chunks", "SELECT rowid FROM chunks_fts", "SELECT chunk_id FROM vectors")
            )
        found += [f"chunk {chunk} is not in the keyword index" for chunk in chunks ^ entries]
        return found + [f"chunk {chunk} has no vector" for chunk in chunks ^ vectors]

    def events(self) -> Counter[str]:
        """How many events there are for each answer topic."""
        with self._open("events.db") as events:
            return Counter(row[0] for row in events.execute("SELECT reply_topic FROM events"))

    def answers(self) -> dict[str, bytes]:
        """The stored answers by answer topic."""
        query = "SELECT reply_topic, body FROM answers JOIN events ON events.id = event_id"
        with self._open("events.db") as events:
            return {topic: bytes(body) for topic, body in events.execute(query)}

    def documents(self) -> dict[str, str]:
        """The texts by id."""
        with self._open("knowledge.db") as knowledge:
            return dict(knowledge.execute("SELECT id, text FROM documents").fetchall())

    def holding(self, word: str) -> set[str]:
        """The documents that the keyword index finds by a word."""
        query = (
            "SELECT document_id FROM chunks JOIN chunks_fts ON chunks_fts.rowid = chunks.id WHERE chunks_fts MATCH ?"
        )
        with self._open("knowledge.db") as knowledge:
            return {row[0] for row in knowledge.execute(query, (word,))}

    def _flaws(self, name: str) -> Iterator[str]:
        with self._open(name) as database:
            for row in database.execute("PRAGMA integrity_check"):
                if row != ("ok",):
                    yield f"{name}: {row[0]}"
            for row in database.execute("PRAGMA foreign_key_check"):
                yield f"{name}: {row}"

    @contextmanager
    def _open(self, name: str) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.folder / name)) as connection:
            yield connection
