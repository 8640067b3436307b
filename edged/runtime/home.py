"""A home directory belongs to one process: two daemons over the same databases would each believe they own them."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from edged.config import Config
from edged.errors import ConfigError, DiskFullError, EdgedError, HomeInUseError


def refusals(config: Config) -> Iterator[EdgedError]:
    """Why the home directory could not be used; makes nothing."""
    there = config.run_dir
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        yield _unusable(config, error)


@contextlib.contextmanager
def hold_home(config: Config) -> Iterator[None]:
    """Hold the lock of the home directory, which is made when it is missing.

    The kernel lets go of it when the process ends, however that happens.
    Raises :class:`HomeInUseError` while another holds it, :class:`ConfigError` or :class:`DiskFullError`.
    """
    try:
        config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (config.run_dir / "lock").open("w")
    except OSError as error:
        raise _unusable(config, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HomeInUseError(
                f"another edged runs in {config.home}", hint="stop it, or give this one its own home (EDGED_HOME)"
            ) from error
        yield


def mark_ready(config: Config) -> None:
    """Leave a file, which the installer removes before a version starts: after a power cut it tells that one served."""
    with contextlib.suppress(OSError):
        (config.run_dir / "ready").touch()


def _unusable(config: Config, error: OSError) -> EdgedError:
    kind = DiskFullError if error.errno == errno.ENOSPC else ConfigError
    return kind(
        f"cannot use the home directory {config.home}: {error.strerror}", hint="set EDGED_HOME to one you may write"
    )
