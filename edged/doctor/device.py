"""Where facts are read from: the system's files, its commands, the running daemon. A test gives others."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edged.client import Client
from edged.config import Config
from edged.errors import EdgedError
from edged.gateway.wire import StatusBody

COMMAND_SECONDS = 5.0


def run_command(command: Sequence[str]) -> str | None:
    """What a command prints; None where it is missing, fails, or takes too long."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, check=False
        )
        if done.returncode == 0:
            return done.stdout
    return None


@dataclass(frozen=True)
class Daemon:
    """What answers at ``http.listen``: the ``status`` of our daemon, or why there is none."""

    status: StatusBody | None
    problem: str = ""


def ask_daemon(config: Config) -> Daemon:
    """Blocks for as long as whoever holds the port stays silent."""
    try:
        with Client.of(config) as client:
            return Daemon(client.status())
    except EdgedError as error:
        return Daemon(None, error.message)


@dataclass(frozen=True)
class Device:
    """The device to look at. ``root`` is where its file system begins."""

    config: Config
    daemon: Daemon
    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = run_command
    page_bytes: int = os.sysconf("SC_PAGE_SIZE")

    def path(self, inside: str) -> Path:
        return self.root / inside

    def glob(self, pattern: str) -> list[Path]:
        """Files of that pattern below the root, in order."""
        return sorted(self.root.glob(pattern))

    def read(self, file: Path | str) -> str:
        """The text of a small file without its outer white space; empty where it cannot be read."""
        try:
            return (self.root / file).read_text(encoding="utf-8", errors="replace").strip("\0 \t\n")
        except OSError:
            return ""

    def number(self, file: Path | str) -> int | None:
        """The number in a file; None where there is none."""
        try:
            return int(self.read(file), 0)
        except ValueError:
            return None

    @property
    def model(self) -> str:
        """The board's name from its device tree; empty on a PC."""
        return self.read("proc/device-tree/model")
