"""Real SQLite files: group commit, failures that stay apart, migrations, closing."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from edged.errors import DiskFullError, NewerSchemaError, StoreClosedError, StoreError
from edged.store.database import GROUP_LIMIT, Database

Work = Callable[[sqlite3.Connection], None]


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    directory = tmp_path / "migrations"
    directory.mkdir()
    (directory / "0001_initial.sql").write_text(
        "CREATE TABLE things (name TEXT PRIMARY KEY) STRICT;\n"
        "CREATE TABLE parts (thing TEXT REFERENCES things (name) DEFERRABLE INITIALLY DEFERRED) STRICT;\n"
    )
    return directory


@pytest.fixture
async def database(tmp_path: Path, migrations: Path) -> AsyncIterator[Database]:
    database = await Database.open(tmp_path / "test.db", migrations)
    yield database
    await database.close()


def insert(name: str) -> Work:
    def work(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO things VALUES (?)", (name,))

    return work


def insert_then(name: str, error: Exception) -> Work:
    def work(connection: sqlite3.Connection) -> None:
        insert(name)(connection)
        raise error

    return work


def insert_orphan(connection: sqlite3.Connection) -> None:
    """Breaks a constraint that is only looked at by COMMIT."""
    connection.execute("INSERT INTO parts VALUES ('no such thing')")


def names(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT name FROM things ORDER BY name")]


def rows_seen_from_outside(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return names(connection)


@contextlib.asynccontextmanager
async def writer_held(database: Database) -> AsyncIterator[None]:
    """Keeps the writer busy with a write of its own, so that what is queued meanwhile is taken together."""
    running, release = threading.Event(), threading.Event()

    def hold(_: sqlite3.Connection) -> None:
        running.set()
        release.wait()

    held = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(running.wait)
    try:
        yield
    finally:
        release.set()
    await held


async def queued(database: Database, work: Work) -> "asyncio.Task[None]":
    """A task that has queued ``work``."""
    task = asyncio.create_task(database.write(work))
    await asyncio.sleep(0)
    return task


async def as_one_group(database: Database, *works: Work) -> list[BaseException | None]:
    """The outcomes of ``works``, in order, when the writer takes them together."""
    async with writer_held(database):
        tasks = [await queued(database, work) for work in works]
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_write_is_read_back(database: Database) -> None:
    await database.write(insert("a"))
    assert await database.read(names) == ["a"]


async def test_a_write_returns_what_its_work_returns(database: Database) -> None:
    assert await database.write(names) == []


async def test_every_connection_flushes_fully_and_checks_foreign_keys(database: Database) -> None:
    def settings(connection: sqlite3.Connection) -> list[object]:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        return [connection.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in pragmas]

    assert await database.write(settings) == ["wal", 2, 1, 5000]
    assert await database.read(settings) == ["wal", 2, 1, 5000]


async def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(StoreError, match="readonly"):
        await database.read(insert("a"))


async def test_one_read_sees_one_state_while_others_write(database: Database) -> None:
    loop = asyncio.get_running_loop()

    def twice(connection: sqlite3.Connection) -> tuple[list[str], list[str]]:
        before = names(connection)
        asyncio.run_coroutine_threadsafe(database.write(insert("a")), loop).result()
        return before, names(connection)

    assert await database.read(twice) == ([], [])
    assert await database.read(names) == ["a"]


async def test_two_reads_run_at_the_same_time(database: Database) -> None:
    together = threading.Barrier(2, timeout=10)
    await asyncio.gather(database.read(lambda _: together.wait()), database.read(lambda _: together.wait()))


async def test_a_write_is_not_answered_before_the_commit_it_shares(database: Database) -> None:
    first_ran, release = threading.Event(), threading.Event()

    def first(connection: sqlite3.Connection) -> None:
        insert("first")(connection)
        first_ran.set()

    def second(connection: sqlite3.Connection) -> None:
        release.wait()
        insert("second")(connection)

    async with writer_held(database):
        answered = await queued(database, first)
        other = await queued(database, second)
    await asyncio.to_thread(first_ran.wait)
    try:
        assert await asyncio.to_thread(rows_seen_from_outside, database.path) == []
        assert not answered.done()
    finally:
        release.set()
    await answered
    assert await asyncio.to_thread(rows_seen_from_outside, database.path) == ["first", "second"]
    await other


async def test_what_follows_a_commit_sees_it_from_any_connection(database: Database) -> None:
    seen: list[list[str]] = []
    await database.write(insert("a"), on_commit=lambda _: seen.append(rows_seen_from_outside(database.path)))
    assert seen == [["a"]]


async def test_many_waiting_writes_share_few_commits(database: Database) -> None:
    count = GROUP_LIMIT * 2
    statements: list[str] = []
    await database.write(lambda connection: connection.set_trace_callback(statements.append))
    await as_one_group(database, *(insert(f"{number:03}") for number in range(count)))
    await database.write(lambda connection: connection.set_trace_callback(None))
    assert len(await database.read(names)) == count
    assert statements.count("COMMIT") <= 5  # the setting's own, the held one, two full groups


async def test_writes_happen_in_the_order_of_their_calls(database: Database) -> None:
    order: list[int] = []
    committed: list[int] = []

    async def write(number: int) -> None:
        await database.write(lambda _: order.append(number), on_commit=lambda _: committed.append(number))

    await asyncio.gather(*(write(number) for number in range(200)))
    assert order == committed == list(range(200))


async def test_a_failing_write_undoes_only_itself_and_reaches_only_its_caller(database: Database) -> None:
    oops = RuntimeError("mine")
    outcomes = await as_one_group(
        database, insert("a"), insert_then("b", oops), insert("c"), insert("a"), insert_then("d", ValueError("his"))
    )
    assert [type(outcome) for outcome in outcomes] == [
        type(None),
        RuntimeError,
        type(None),
        sqlite3.IntegrityError,
        ValueError,
    ]
    assert outcomes[1] is oops
    assert await database.read(names) == ["a", "c"]


async def test_a_failed_commit_reaches_everyone_in_it_and_nobody_after_it(database: Database) -> None:
    outcomes = await as_one_group(database, insert("a"), insert_orphan, insert("b"))
    assert [type(outcome) for outcome in outcomes] == [StoreError] * 3
    assert len({id(outcome) for outcome in outcomes}) == 3  # each caller has an error, and a traceback, of its own
    await database.write(insert("later"))
    assert await database.read(names) == ["later"]


async def test_nothing_follows_a_commit_that_failed(database: Database) -> None:
    followed: list[None] = []
    with pytest.raises(StoreError):
        await database.write(insert_orphan, on_commit=followed.append)
    assert followed == []


async def test_a_full_disk_is_named_and_writing_resumes_when_there_is_space(database: Database) -> None:
    def limit_pages(pages: int) -> Callable[[sqlite3.Connection], object]:
        return lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()

    await database.write(insert("before"))
    await database.write(limit_pages(1))
    with pytest.raises(DiskFullError) as caught:
        await database.write(insert("x" * 1_000_000))
    assert caught.value.retryable
    assert caught.value.facts["path"] == database.path
    await database.write(limit_pages(1_000_000))
    await database.write(insert("z"))
    assert await database.read(names) == ["before", "z"]
    assert await database.check() == []


@pytest.mark.parametrize("statement", ["ROLLBACK", "COMMIT"])
async def test_a_lost_transaction_fails_those_in_it_and_the_rest_go_on(database: Database, statement: str) -> None:
    """SQLite drops a whole transaction after some errors of the disk; a work that ends it looks the same."""

    def end_transaction(connection: sqlite3.Connection) -> None:
        connection.execute(statement)

    outcomes = await as_one_group(database, insert("a"), end_transaction, insert("c"))
    assert [type(outcome) for outcome in outcomes] == [StoreError, StoreError, type(None)]
    assert "c" in await database.read(names)


async def test_a_file_locked_by_another_program_is_an_error_and_writing_resumes_after_it(database: Database) -> None:
    await database.write(lambda connection: connection.execute("PRAGMA busy_timeout = 1").fetchone())
    with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked") as caught:
            await database.write(insert("a"))
        assert "another program" in caught.value.hint
    await database.write(insert("b"))
    assert await database.read(names) == ["b"]


async def test_a_cancelled_caller_does_not_stop_its_running_write(database: Database) -> None:
    running, release = threading.Event(), threading.Event()
    followed: list[None] = []

    def work(connection: sqlite3.Connection) -> None:
        running.set()
        release.wait()
        insert("a")(connection)

    task = asyncio.create_task(database.write(work, on_commit=followed.append))
    await asyncio.to_thread(running.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    await database.write(insert("b"))
    assert await database.read(names) == ["a", "b"]
    assert followed == [None]


async def test_a_cancelled_caller_drops_its_queued_write(database: Database) -> None:
    async with writer_held(database):
        task = await queued(database, insert("a"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await database.write(insert("b"))
    assert await database.read(names) == ["b"]


async def test_what_fails_after_the_commit_reaches_its_caller_and_the_rows_stay(database: Database) -> None:
    def fail(_: None) -> None:
        raise RuntimeError("after the commit")

    with pytest.raises(RuntimeError, match="after the commit"):
        await database.write(insert("a"), on_commit=fail)
    assert await database.read(names) == ["a"]


async def test_close_finishes_queued_writes_and_leaves_one_file(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "closing.db"
    database = await Database.open(path, migrations)
    tasks = [asyncio.create_task(database.write(insert(str(number)))) for number in range(100)]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*tasks)
    assert sorted(file.name for file in tmp_path.glob("closing.db*")) == ["closing.db"]
    assert len(rows_seen_from_outside(path)) == 100


async def test_closing_twice_or_at_once_is_no_error(tmp_path: Path, migrations: Path) -> None:
    database = await Database.open(tmp_path / "closing.db", migrations)
    await asyncio.gather(database.close(), database.close())
    await database.close()


async def test_a_closed_database_refuses_work(database: Database) -> None:
    await database.close()
    with pytest.raises(StoreClosedError):
        await database.write(insert("a"))
    with pytest.raises(StoreClosedError):
        await database.read(names)


async def test_close_lets_a_running_read_finish(database: Database) -> None:
    running, release = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> list[str]:
        running.set()
        release.wait()
        return names(connection)

    reading = asyncio.create_task(database.read(slow))
    await asyncio.to_thread(running.wait)
    closing = asyncio.create_task(database.close())
    await asyncio.sleep(0)
    release.set()
    assert await reading == []
    await closing


async def test_new_migrations_run_once_and_keep_the_rows(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "growing.db"
    first = await Database.open(path, migrations)
    await first.write(insert("a"))
    await first.close()
    (migrations / "0002_log.sql").write_text(
        "-- a trigger holds semicolons of its own; so does this comment\n"
        "CREATE TABLE log (name TEXT);\n"
        "CREATE TRIGGER logged AFTER INSERT ON things BEGIN\n"
        "    INSERT INTO log VALUES (new.name);\n"
        "    INSERT INTO log VALUES ('again;');\n"
        "END;\n"
    )
    for name in ("b", "c"):
        database = await Database.open(path, migrations)
        await database.write(insert(name))
        assert await database.read(lambda connection: connection.execute("PRAGMA user_version").fetchone()[0]) == 2
        await database.close()
    assert rows_seen_from_outside(path) == ["a", "b", "c"]


async def test_a_failing_migration_leaves_the_file_as_it_was(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "stuck.db"
    await (await Database.open(path, migrations)).close()
    (migrations / "0002_broken.sql").write_text("CREATE TABLE extra (name TEXT);\nINSERT INTO nowhere VALUES (1);\n")
    with pytest.raises(StoreError, match="nowhere"):
        await Database.open(path, migrations)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'extra'").fetchone() == (0,)


async def test_a_file_of_a_newer_edged_is_refused_and_not_touched(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "newer.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 7")
    before = path.read_bytes()
    with pytest.raises(NewerSchemaError) as caught:
        await Database.open(path, migrations)
    assert caught.value.facts["found"] == 7
    assert caught.value.facts["known"] == 1
    assert path.read_bytes() == before


async def test_a_gap_in_the_migrations_is_an_error(tmp_path: Path, migrations: Path) -> None:
    (migrations / "0003_late.sql").write_text("SELECT 1;")
    with pytest.raises(StoreError, match="0002"):
        await Database.open(tmp_path / "gap.db", migrations)


async def test_a_file_that_is_no_database_is_named_so(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "photo.db"
    path.write_bytes(b"\xff\xd8" * 4096)
    with pytest.raises(StoreError, match="not a database"):
        await Database.open(path, migrations)


async def test_a_missing_directory_is_named_so(tmp_path: Path, migrations: Path) -> None:
    with pytest.raises(StoreError) as caught:
        await Database.open(tmp_path / "missing" / "test.db", migrations)
    assert "directory" in caught.value.hint


async def test_a_damaged_file_is_found_by_the_check(tmp_path: Path, migrations: Path) -> None:
    path = tmp_path / "damaged.db"
    database = await Database.open(path, migrations)
    await asyncio.gather(*(database.write(insert(f"{number:0200}")) for number in range(500)))
    await database.close()
    content = bytearray(path.read_bytes())
    content[-4096 * 3 : -4096 * 2] = b"\x00" * 4096
    path.write_bytes(content)
    reopened = await Database.open(path, migrations)
    assert await reopened.check() != []
    await reopened.close()
