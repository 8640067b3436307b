"""Before an upgrade: whether this version can bring the stores to its schema, tried on copies while they are in use."""

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from edged.config import Config
from edged.errors import DiskFullError, StoreError
from edged.events.inbox import Inbox
from edged.store.knowledge import KnowledgeStore

PREFIX = ".rehearsal-"
ROOM = 2  # a copy and its migrated pages, as multiples of a store's size


class Rehearsed(msgspec.Struct, frozen=True):
    """A store and its schema's number, before and after; ``migrates`` when a start of this version changes it."""

    file: str
    schema: int
    schema_after: int

    @property
    def migrates(self) -> bool:
        return self.schema != self.schema_after


def rehearse(config: Config) -> Iterator[Rehearsed]:
    """Migrate and check a copy of each store that exists; the copies are removed. Blocks, also for an event loop.

    Raises :class:`StoreError` for a store that cannot be brought on or is damaged, :class:`DiskFullError` without room.
    """
    for left in config.home.glob(f"{PREFIX}*"):  # by a power cut
        shutil.rmtree(left, ignore_errors=True)
    for path, opened in ((config.events_db, Inbox.open), (config.knowledge_db, KnowledgeStore.open)):
        if path.exists():
            _require_room(path)
            with tempfile.TemporaryDirectory(prefix=PREFIX, dir=config.home) as folder:
                copy = Path(folder) / path.name
                before = _copy(path, copy)
                _require_intact(path, asyncio.run(_migrate(opened, copy)))
                yield Rehearsed(path.name, before, _schema(copy))


async def _migrate(opened: Callable[[Path], Awaitable[Inbox | KnowledgeStore]], copy: Path) -> list[str]:
    """Open the store, which brings it to the newest schema; what is wrong with it then."""
    store = await opened(copy)
    try:
        return await store.database.check()
    finally:
        await store.close()


def _require_room(path: Path) -> None:
    needed, free = ROOM * path.stat().st_size, shutil.disk_usage(path.parent).free
    if free < needed:
        raise DiskFullError(
            f"a copy of {path} needs {needed} bytes, {free} are free", hint="free space on the disk that holds it"
        )


def _require_intact(path: Path, damages: list[str]) -> None:
    if damages:
        raise StoreError(f"{path} is damaged: {damages[0]}", hint="restore it from a copy", path=path)


def _copy(path: Path, copy: Path) -> int:
    """A consistent copy, also of a store in use; its schema's number."""
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.execute("PRAGMA query_only = ON")
            source.backup(target)
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be copied: {error}", hint="restore it from a copy", path=path) from error
    return _schema(copy)


def _schema(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
