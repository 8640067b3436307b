"""The journal's native protocol: a log line with its named values as fields, one datagram each.

https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

import contextlib
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, TextIO

JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog(3)'s priorities by structlog's levels."""
_NOT_IN_NAMES = re.compile(r"[^A-Z0-9]+")
LONGEST_NAME = 64


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether ``stream`` goes to the journal: ``$JOURNAL_STREAM`` names the device and inode of that socket."""
    named = environment.get("JOURNAL_STREAM")
    if named is None:
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def render(_logger: object, _method: str, event: MutableMapping[str, Any]) -> bytes:
    """structlog's last processor: an entry with ``MESSAGE``, ``PRIORITY`` and each value as ``EDGED_<NAME>``."""
    level, trace = str(event.pop("level", "info")), event.pop("exception", None)
    name = str(event.pop("event", ""))
    values = {key: value if isinstance(value, str) else repr(value) for key, value in event.items()}
    message = " ".join([name, *(f"{key}={value}" for key, value in values.items())])
    fields = {
        "MESSAGE": message if trace is None else f"{message}\n{trace}",
        "PRIORITY": str(PRIORITIES.get(level, 6)),
        "SYSLOG_IDENTIFIER": "edged",
        "EDGED_EVENT": name,
        **{_field_name(key): value for key, value in values.items()},
    }
    return b"".join(_field(key, value) for key, value in fields.items())


def _field_name(key: str) -> str:
    return f"EDGED_{_NOT_IN_NAMES.sub('_', key.upper())}"[:LONGEST_NAME].rstrip("_")


def _field(name: str, value: str) -> bytes:
    """``NAME=value``, or for more lines than one the name, the length and the bytes."""
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)


class JournalLogger:
    """Sends entries; one that the journal does not take is written to stderr, which it reads too."""

    def __init__(self, path: Path = JOURNAL_SOCKET) -> None:
        self._path = str(path)

    def __call__(self, *_names: object) -> "JournalLogger":
        """As structlog's logger factory."""
        return self

    def msg(self, entry: bytes) -> None:
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.sendto(entry, self._path)
        except OSError:  # larger than a datagram may be, the journal is away, or no descriptor is left
            with contextlib.suppress(OSError):  # which may go the same way
                sys.stderr.write(entry.decode("utf-8", "backslashreplace"))

    debug = info = warning = error = critical = exception = msg
