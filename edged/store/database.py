"""One SQLite file with one writer and a few readers, off the event loop.

Writes that wait together share one transaction, so that many small durable writes cost one flush of the disk.
"""

import asyncio
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from edged.errors import DiskFullError, NewerSchemaError, StoreClosedError, StoreError

T = TypeVar("T")

BUSY_TIMEOUT_MS = 5_000
GROUP_LIMIT = 64

_CALLERS_OWN_MISTAKE = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError)


class _Job(NamedTuple):
    """A queued write, what to do once it is durable, and whom to tell."""

    work: Callable[[sqlite3.Connection], Any]
    on_commit: Callable[[Any], None] | None
    future: Future[Any]


class _Connections(NamedTuple):
    writer: sqlite3.Connection
    readers: tuple[sqlite3.Connection, ...]


class Database:
    """A SQLite file in WAL mode, every commit flushed to the disk. Use it from one event loop.

    All writes run in one thread, in the order of their calls; reads run beside them on a pool of their own,
    each seeing one consistent state.
    """

    def __init__(self, path: Path, connections: _Connections) -> None:
        """Takes over open connections; :meth:`open` makes them."""
        self.path = path
        self._closed = False
        self._connections = connections
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        for connection in connections.readers:
            self._idle.put(connection)
        self._readers = ThreadPoolExecutor(len(connections.readers), thread_name_prefix=f"{path.stem}-reader")
        self._writer = threading.Thread(target=self._serve, name=f"{path.stem}-writer", daemon=True)
        self._writer.start()

    @classmethod
    async def open(cls, path: Path, migrations: Traversable | Path, *, readers: int = 2) -> "Database":
        """Open or create ``path`` and bring it to the newest schema.

        ``migrations`` is a directory of ``NNNN_name.sql``, numbered from 0001 without gaps; each runs in a
        transaction of its own and its number becomes the file's ``user_version``.
        Raises :class:`NewerSchemaError`, :class:`DiskFullError` or :class:`StoreError`.
        """
        return cls(path, await asyncio.to_thread(_connect, path, migrations, readers))

    async def write(
        self, work: Callable[[sqlite3.Connection], T], *, on_commit: Callable[[T], None] | None = None
    ) -> T:
        """Run ``work`` in the writer thread and return its result once it is durable.

        ``work`` may share its transaction with others but fails alone: what it raises undoes only what it did.
        It must neither begin nor end a transaction. ``on_commit`` is called with the result in the writer thread,
        after the commit and in the order of the writes: state derived from the rows is kept equal to them there.
        A caller cancelled while its work runs does not stop it; work still queued is then dropped.
        Raises :class:`StoreClosedError`, :class:`DiskFullError`, :class:`StoreError` or what ``work`` raised.
        """
        self._refuse_when_closed()
        future: Future[T] = Future()
        self._jobs.put(_Job(work, on_commit, future))
        return await asyncio.wrap_future(future)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``work`` in the read pool, within one snapshot of the file; it cannot write.

        Raises :class:`StoreClosedError`, :class:`StoreError` or what ``work`` raised.
        """
        self._refuse_when_closed()
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    async def answer(self) -> None:
        """Return once the writer and a reader have answered; nothing is written. Raises :class:`StoreError`."""
        await self.write(lambda _connection: None)
        await self.read(lambda connection: connection.execute("PRAGMA schema_version").fetchone())

    async def check(self) -> list[str]:
        """What SQLite finds wrong with the file, one sentence each; empty when it is intact. Reads every page."""
        return await self.read(_integrity)

    async def close(self) -> None:
        """Finish what is queued, fold the write-ahead log into the file and release it. Idempotent."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StoreClosedError(f"{self.path} is closed", hint="edged is stopping", path=self.path)

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._idle.get()
        try:
            connection.execute("BEGIN")
            return work(connection)
        except sqlite3.Error as error:
            _raise_translated(error, self.path)
        finally:
            _roll_back(connection)
            self._idle.put(connection)

    def _serve(self) -> None:
        while group := self._next_group():
            while group:
                _commit_together(self._connections.writer, group, self.path)
        self._readers.shutdown(wait=True)
        for connection in self._connections.readers:
            connection.close()
        _checkpoint_and_close(self._connections.writer)

    def _next_group(self) -> deque[_Job]:
        """Wait for a write and take all that are queued with it; none means that the database closes."""
        group: deque[_Job] = deque()
        while not group:
            job = self._jobs.get()
            while job is not None:
                if job.future.set_running_or_notify_cancel():
                    group.append(job)
                if len(group) == GROUP_LIMIT or self._jobs.empty():
                    break
                job = self._jobs.get()
            if job is None:
                self._jobs.put(None)  # for the next call; nothing is queued behind it
                break
        return group


def _commit_together(connection: sqlite3.Connection, jobs: deque[_Job], path: Path) -> None:
    """Run ``jobs`` in one transaction and settle them after its commit.

    Some errors of the disk make SQLite drop the whole transaction. Then everyone who was in it fails, and the jobs
    not yet begun stay in ``jobs`` for the next one.
    """
    succeeded: list[tuple[_Job, Any]] = []
    failed: list[tuple[_Job, BaseException]] = []
    failure: BaseException | None = _execute(connection, "BEGIN IMMEDIATE")
    if failure is not None:
        failed = [(job, failure) for job in jobs]
        jobs.clear()
    while jobs and connection.in_transaction:
        job = jobs.popleft()
        try:
            succeeded.append((job, _in_savepoint(connection, job.work)))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the caller, not this thread
            failed.append((job, error))
    if succeeded:
        failure = _execute(connection, "COMMIT") if connection.in_transaction else failed[-1][1]
    _roll_back(connection)
    for job, result in succeeded:
        if failure is None:
            _settle(job, result)
        else:
            job.future.set_exception(_lost(failure, path))
    for job, own_failure in failed:
        job.future.set_exception(_translated(own_failure, path))


def _in_savepoint(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
    connection.execute("SAVEPOINT work")
    try:
        result = work(connection)
        connection.execute("RELEASE work")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK TO work")
            connection.execute("RELEASE work")
        raise
    return result


def _settle(job: _Job, result: Any) -> None:
    try:
        if job.on_commit is not None:
            job.on_commit(result)
    except BaseException as error:  # noqa: BLE001 - as above: its caller receives it
        job.future.set_exception(error)
    else:
        job.future.set_result(result)


def _execute(connection: sqlite3.Connection, statement: str) -> sqlite3.Error | None:
    try:
        connection.execute(statement)
    except sqlite3.Error as error:
        return error
    return None


def _roll_back(connection: sqlite3.Connection) -> None:
    """End whatever transaction is open; where even that fails, the next BEGIN says so to its callers."""
    with suppress(sqlite3.Error):
        connection.rollback()


def _checkpoint_and_close(connection: sqlite3.Connection) -> None:
    # A log that cannot be folded in stays beside the file and is replayed by the next open: nothing is lost.
    with suppress(sqlite3.Error):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def _integrity(connection: sqlite3.Connection) -> list[str]:
    try:
        found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
    except sqlite3.DatabaseError as error:  # too damaged for the check itself
        return [str(error)]
    dangling = connection.execute("PRAGMA foreign_key_check")
    return found + [f"row {row} of {table} refers to a missing row of {parent}" for table, row, parent, _ in dangling]


# --- errors ----------------------------------------------------------------------------------------


def _translated(error: BaseException, path: Path) -> BaseException:
    """``error`` as callers know it: SQLite's own become store errors, all others stay themselves."""
    if not isinstance(error, sqlite3.Error) or isinstance(error, _CALLERS_OWN_MISTAKE):
        return error
    return _lost(error, path)


def _lost(error: BaseException, path: Path) -> StoreError | DiskFullError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes keep the primary one in their low byte
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if code == sqlite3.SQLITE_FULL:
        full = DiskFullError(
            f"no space left for {path}", hint="free space on the disk that holds EDGED_HOME", path=path
        )
        full.__cause__ = error
        return full
    hint = {
        sqlite3.SQLITE_BUSY: "another program holds the file locked; end it",
        sqlite3.SQLITE_CANTOPEN: "check that the directory exists and belongs to edged's user",
        sqlite3.SQLITE_READONLY: "let edged's user write to the file and its directory",
        sqlite3.SQLITE_NOTADB: "the file is no SQLite database; move it away or restore it",
        sqlite3.SQLITE_CORRUPT: "the file is damaged; restore it from a copy",
        sqlite3.SQLITE_IOERR: "check the disk that holds EDGED_HOME",
    }.get(code, "")
    failed = StoreError(f"{path}: {error}", hint=hint, path=path, sqlite=name)
    failed.__cause__ = error
    return failed


def _raise_translated(error: sqlite3.Error, path: Path) -> NoReturn:
    translated = _translated(error, path)
    if translated is error:
        raise error
    raise translated from error


# --- opening ---------------------------------------------------------------------------------------


def _connect(path: Path, migrations: Traversable | Path, readers: int) -> _Connections:
    scripts = _scripts(migrations)
    with ExitStack() as opened:
        try:
            writer = _connection(path, opened)
            _refuse_newer(writer, len(scripts), path)
            mode = writer.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise StoreError(
                    f"{path} cannot have a write-ahead log (mode '{mode}')",
                    hint="keep EDGED_HOME on a local disk",
                    path=path,
                )
            while _migrate_one(writer, scripts, path):
                pass
            pool = tuple(_connection(path, opened) for _ in range(readers))
            for connection in pool:
                connection.execute("PRAGMA query_only = ON")
        except sqlite3.Error as error:
            raise _lost(error, path) from error
        opened.pop_all()
    return _Connections(writer, pool)


def _connection(path: Path, opened: ExitStack) -> sqlite3.Connection:
    # Connections are opened in one thread and then each used by one thread at a time.
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    opened.callback(connection.close)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _scripts(migrations: Traversable | Path) -> list[str]:
    """The migrations' texts; the one at index ``n`` leads to version ``n + 1``."""
    files = sorted((file for file in migrations.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    for number, file in enumerate(files, start=1):
        if not file.name.startswith(f"{number:04d}_"):
            raise StoreError(f"migration {file.name} stands where number {number:04d} belongs", file=file.name)
    return [file.read_text(encoding="utf-8") for file in files]


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _refuse_newer(connection: sqlite3.Connection, known: int, path: Path) -> None:
    found = _version(connection)
    if found > known:
        raise NewerSchemaError(
            f"{path} has schema {found}, this edged knows {known}",
            hint="install the edged that wrote it, or a newer one",
            path=path,
            found=found,
            known=known,
        )


def _migrate_one(connection: sqlite3.Connection, scripts: list[str], path: Path) -> bool:
    """Run the next migration in one transaction; whether there was one.

    The version is read inside the transaction: another process may be opening the same file.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        _refuse_newer(connection, len(scripts), path)
        version = _version(connection)
        if version == len(scripts):
            return False
        for statement in _statements(scripts[version]):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {version + 1}")
        connection.execute("COMMIT")
    finally:
        _roll_back(connection)
    return True


def _statements(script: str) -> Iterator[str]:
    """The statements of a script. ``executescript`` would commit the transaction it is called in."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement
