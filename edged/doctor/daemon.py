"""The running daemon: asked for its status where that starts nothing."""

import fcntl

import httpx

from edged.client import Client
from edged.config import Config
from edged.doctor import systemd
from edged.doctor.device import Daemon, Device, Reach
from edged.doctor.patience import bounded
from edged.errors import DaemonUnreachableError, EdgedError, UnauthorizedError

ANSWER_SECONDS = 3.0
BUSY_SECONDS = 15.0
"""For a daemon that is known to run: while it loads models, a slow device has no time for anything else."""


def find_daemon(device: Device) -> Daemon:
    """Who serves at ``http.listen``, and where nobody says it, whether edged runs all the same."""
    if systemd.would_start_edged(device):
        return Daemon(None, "systemd starts it with the first request", Reach.WAITS)
    found = _ask_for(device.config, ANSWER_SECONDS)
    if not _is_unheard(found) or not _runs(device):
        return found
    if found.reach is Reach.SILENT:
        found = _ask_for(device.config, BUSY_SECONDS)
    return Daemon(None, found.problem, Reach.RUNS) if _is_unheard(found) else found


def ask_daemon(config: Config) -> Daemon:
    """Blocks for as long as whoever holds the port stays silent."""
    try:
        with Client.of(config) as client:
            return Daemon(client.status())
    except UnauthorizedError as error:
        return Daemon(None, error.message, Reach.CLOSED)
    except DaemonUnreachableError as error:
        has_failed = isinstance(error.__cause__, httpx.TransportError | OSError)  # else there was an answer, of others
        return Daemon(None, error.message, Reach.NOBODY if has_failed else Reach.STRANGER)
    except EdgedError as error:
        return Daemon(None, error.message, Reach.RUNS)


def _is_unheard(found: Daemon) -> bool:
    return found.status is None and found.reach in (Reach.NOBODY, Reach.SILENT)


def _ask_for(config: Config, seconds: float) -> Daemon:
    found = bounded(lambda: ask_daemon(config), seconds)
    if isinstance(found, Daemon):
        return found
    if isinstance(found, TimeoutError):
        return Daemon(None, f"who serves there does not answer within {seconds:.0f} s", Reach.SILENT)
    return Daemon(None, f"{type(found).__name__}: {found}")


def _runs(device: Device) -> bool:
    return systemd.main_pid(device) is not None or _is_home_held(device.config)


def _is_home_held(config: Config) -> bool:
    """The daemon locks its home for as long as it runs (:mod:`edged.runtime.home`)."""
    try:
        with (config.run_dir / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
