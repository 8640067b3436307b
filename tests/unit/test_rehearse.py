"""An upgrade tried on copies: what would change is said, and the stores themselves stay as they are."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from edged.config import Config
from edged.errors import NewerSchemaError, StoreError
from edged.events.inbox import Inbox
from edged.rehearse import Rehearsed, rehearse
from edged.store.knowledge import KnowledgeStore


async def make_stores(config: Config) -> None:
    await (await Inbox.open(config.events_db)).close()
    await (await KnowledgeStore.open(config.knowledge_db)).close()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A home with both stores, of the newest schema."""
    config = Config(home=tmp_path)
    asyncio.run(make_stores(config))
    return config


def set_schema(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")


def user_version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def test_stores_of_this_version_stay_at_their_schema(config: Config) -> None:
    found = list(rehearse(config))
    assert [one.file for one in found] == ["events.db", "knowledge.db"]
    assert not any(one.migrates for one in found)


def test_an_older_store_is_brought_on_in_its_copy_alone(config: Config) -> None:
    config.events_db.unlink()
    with closing(sqlite3.connect(config.events_db)):
        pass
    (config.home / ".rehearsal-before-a-power-cut").mkdir()
    found = {one.file: one for one in list(rehearse(config))}
    assert found["events.db"].schema == 0
    assert found["events.db"].migrates
    assert dump(config.events_db) == ["BEGIN TRANSACTION;", "COMMIT;"]
    assert {path.name for path in config.home.iterdir() if path.name.startswith(".")} == set()


def test_a_store_in_use_is_copied_as_of_one_moment(config: Config) -> None:
    with closing(sqlite3.connect(config.events_db, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM events")
        assert next(rehearse(config)) == Rehearsed("events.db", *[user_version(config.events_db)] * 2)


def test_a_store_of_a_newer_version_is_refused_and_left_alone(config: Config) -> None:
    set_schema(config.events_db, 999)
    with pytest.raises(NewerSchemaError):
        list(rehearse(config))
    assert [path.name for path in config.home.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_is_no_store_is_refused(config: Config) -> None:
    config.knowledge_db.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"knowledge\.db"):
        list(rehearse(config))


def test_a_home_without_stores_has_nothing_to_rehearse(tmp_path: Path) -> None:
    assert list(rehearse(Config(home=tmp_path))) == []
