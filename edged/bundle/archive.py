"""A bundle's files as one archive: the same bytes for the same files, and under its name only when it is whole.

Nothing of the machine that made it is in it: names in order, one time, one owner, modes by name.
"""

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Final

from edged.bundle import unpack
from edged.bundle.manifest import Declared, Manifest, decode
from edged.errors import BundleError, BundleInvalidError
from edged.models.sources import Progress, disk_errors, require_space

Content = Path | bytes
"""A file on this disk, or what a small one holds."""

MTIME: Final = 315_532_800  # 1980-01-01, the oldest that zip files know; tar complains of 1970
PIECE_BYTES: Final = 1 << 20


class _Watched:
    """A readable file that tells how much of it was read, and its sha256 so far."""

    def __init__(self, readable: IO[bytes], advance: Callable[[int], None]) -> None:
        self._readable = readable
        self._advance = advance
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self._readable.read(size)
        self.digest.update(piece)
        self._advance(len(piece))
        return piece


@contextlib.contextmanager
def _watched(content: Content, advance: Callable[[int], None]) -> Iterator[_Watched]:
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as readable:
        yield _Watched(readable, advance)


def declare(files: Mapping[str, Content], progress: Progress) -> dict[str, Declared]:
    """Size and sha256 of each file, by name."""
    advance, declared = _counter(files, progress), {}
    for name, content in sorted(files.items()):
        with _watched(content, advance) as watched:
            while watched.read(PIECE_BYTES):
                pass
        declared[name] = Declared(watched.digest.hexdigest(), _size(content))
    return declared


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``out`` at the end; on any error nothing is left of it, and ``out`` as it was.

    Raises :class:`DiskFullError` where the disk fills up meanwhile.
    """
    staging = out.with_name(f".{out.name}.partial")
    with disk_errors(out.parent):
        try:
            yield staging
            descriptor = os.open(staging, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            staging.replace(out)
        finally:
            staging.unlink(missing_ok=True)


def write(
    out: Path, manifest: bytes, signature: bytes | None, files: Mapping[str, Content], progress: Progress
) -> None:
    """Write the archive: the manifest first, so that it is checked before the rest is read.

    Raises :class:`DiskFullError` before anything is written where there is no room for all of it.
    """
    signed: dict[str, Content] = {unpack.SIGNATURE: signature} if signature is not None else {}
    everything = {unpack.MANIFEST: manifest, **signed, **dict(sorted(files.items()))}
    padding = 2 * tarfile.BLOCKSIZE * len(everything) + tarfile.RECORDSIZE
    require_space(out.parent, sum(map(_size, everything.values())) + padding)
    advance = _counter(everything, progress)
    with tarfile.open(out, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in everything.items():
            with _watched(content, advance) as watched:
                archive.addfile(_member(name, _size(content)), watched)


def _member(name: str, size: int) -> tarfile.TarInfo:
    if not unpack.NAME.fullmatch(name):
        raise BundleError(f"{name!r} is no name for a file of a bundle", hint="rename the file", name=name)
    member = tarfile.TarInfo(name)
    member.size, member.mtime = size, MTIME
    member.mode = 0o755 if name.startswith("installer/") and name.endswith((".sh", "bundle.py")) else 0o644
    return member


def _counter(files: Mapping[str, Content], progress: Progress) -> Callable[[int], None]:
    total, done = sum(map(_size, files.values())), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return advance


def _size(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


# --- what is in one ------------------------------------------------------------------------------------


def read(file: Path) -> tuple[Manifest, bool]:
    """The manifest as it stands in a bundle, and whether it is signed; nothing is checked."""
    with _named(file):
        text, signature = unpack.head(file)
        return decode(text), signature is not None


def check(file: Path, key: Path | None) -> Manifest:
    """The manifest, once every file was compared with it, and it with its signature where a public ``key`` is given.

    Raises :class:`BundleInvalidError`, as a device would refuse it.
    """
    with _named(file):
        unpack.check(file, unpack.read_key(key) if key is not None else None)
    return read(file)[0]


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except unpack.BrokenBundleError as error:
        raise BundleInvalidError(
            f"the bundle {file} cannot be used: {error}",
            hint=error.advice or "copy it again, or make it again",
            file=file,
        ) from error
