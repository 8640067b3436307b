"""Where facts are read from: the system's files, its commands, the running daemon. A test gives others."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from edged.config import Config
from edged.gateway.wire import StatusBody

COMMAND_SECONDS = 5.0


class Run(Protocol):
    """Runs a command, as :func:`run_command` does."""

    def __call__(self, command: Sequence[str], seconds: float = COMMAND_SECONDS) -> str | None: ...


def run_command(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> str | None:
    """What a command prints; None where it is missing or fails. Raises ``TimeoutError`` where it does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{command[0]} does not end within {seconds:.0f} s") from error
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


class Reach(Enum):
    """What is known of edged where its status is not."""

    NOBODY = "nobody"
    """Nobody was heard at its port."""
    SILENT = "silent"
    """Somebody has its port and says nothing."""
    STRANGER = "stranger"
    """Somebody answers who is no edged."""
    CLOSED = "closed"
    """It answers, but not to this user."""
    RUNS = "runs"
    """It runs, and did not say how it is."""
    WAITS = "waits"
    """systemd holds its port and would start it for a request."""


@dataclass(frozen=True)
class Daemon:
    """The ``status`` of our daemon, or why there is none: ``problem`` in words."""

    status: StatusBody | None
    problem: str = ""
    reach: Reach = Reach.NOBODY


@dataclass(frozen=True)
class Device:
    """The device to look at. ``root`` is where its file system begins."""

    config: Config
    daemon: Daemon
    root: Path = Path("/")
    run: Run = run_command
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
