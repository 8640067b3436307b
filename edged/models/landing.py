"""Put a checked file in place, all or nothing, and keep beside it what was found out about it.

``<file>.json`` holds checksum, size and modification time, so that a start does not read gigabytes again.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edged.errors import ChecksumError, ModelError
from edged.models.gguf import read_header
from edged.models.manifest import ModelKind


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the file beside it. ``recipe`` says how it was converted from which inputs, if it was."""

    name: str
    kind: ModelKind
    sha256: str
    size_bytes: int
    mtime_ns: int
    source: str
    recipe: str = ""

    def matches(self, file: Path) -> bool:
        """Whether ``file`` has the size and modification time it had when this was written."""
        status = file.stat()
        return (self.size_bytes, self.mtime_ns) == (status.st_size, status.st_mtime_ns)


def record_path(file: Path) -> Path:
    """Where the record of ``file`` lies."""
    return file.with_name(file.name + ".json")


def read_record(file: Path) -> Record | None:
    """The record beside ``file``, whether or not the file still matches; None where there is no readable one."""
    try:
        return msgspec.json.decode(record_path(file).read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return None


def write_record(file: Path, *, name: str, kind: ModelKind, sha256: str, source: str, recipe: str = "") -> Record:
    """Replace the record of ``file`` by one with its size and time of now."""
    status = file.stat()
    record = Record(
        name=name,
        kind=kind,
        sha256=sha256,
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        source=source,
        recipe=recipe,
    )
    staging = file.with_name(f".{file.name}.json.staging")
    staging.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    put(staging, record_path(file))
    return record


def checksum(file: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with file.open("rb") as readable:
        return hashlib.file_digest(readable, "sha256").hexdigest()


def check(file: Path, expected_sha256: str | None) -> str:
    """The sha256 of ``file``, after checking that it is a whole GGUF file and has the expected sum, if one is.

    Raises :class:`GgufError` or :class:`ChecksumError`.
    """
    read_header(file)
    found = checksum(file)
    if expected_sha256 is not None and found != expected_sha256:
        raise ChecksumError(
            f"{file.name} has another content than expected",
            hint="the source was changed or the file is damaged; do not use it",
            expected=expected_sha256,
            found=found,
        )
    return found


def land(
    staging: Path,
    target: Path,
    *,
    name: str,
    kind: ModelKind,
    source: str,
    expected_sha256: str | None,
    recipe: str = "",
) -> Record:
    """Check ``staging`` and let it take the place of ``target``; on any error ``target`` is as it was.

    Both are in one directory. Raises as :func:`check`, and ``OSError`` as the system does.
    """
    sha256 = check(staging, expected_sha256)
    put(staging, target)
    return write_record(target, name=name, kind=kind, sha256=sha256, source=source, recipe=recipe)


def put(staging: Path, target: Path) -> None:
    """Atomic and durable. The unlink matters where both are links to one file: rename(2) then does nothing."""
    _sync(staging)
    staging.replace(target)
    staging.unlink(missing_ok=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold ``directory`` against other processes that put models there. Raises :class:`ModelError` when one does."""
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ModelError(
                f"another edged puts models into {directory} now", hint="wait until it is done", directory=directory
            ) from error
        yield
