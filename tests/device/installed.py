"""edged as a service on a board: what the host shows it of the installer, and how tests drive it."""

import contextlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.device.board import HOST, Architecture, Board
from tests.device.bundle import make_bundle

CHECKOUT = Path(__file__).parents[2]
INSTALLER_PARTS = ("install-edge.sh", "scripts", "systemd", "docs", "pyproject.toml")
INSTALL_SECONDS = 3600.0
READY_SECONDS = 600.0
ANSWER_SECONDS = 900.0
BROKER_PORT = 1883
HTTP_PORT = 3000
CONFIG_FILE = "/etc/edged/edged.toml"
MANUAL = "# Pump P-7\n\nError E42 means that the pump runs dry. Close valve V3 and refill the tank to 80 litres.\n"
QUESTION = "What does error E42 of the pump P-7 mean?"
# curl is not on every board, and another Python takes seconds to start on an emulated processor.
ASK_HEALTH = (
    f"exec 3<>/dev/tcp/127.0.0.1/{HTTP_PORT} && "
    "printf 'GET /health HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' >&3 && cat <&3"
)


def make_share(architecture: Architecture, share: Path) -> Path:
    """What the board gets to see of the host: the installer, a bundle, a manual."""
    for part in INSTALLER_PARTS:
        source = CHECKOUT / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, share / part)
    make_bundle(architecture, share / "bundle")
    (share / "manual.md").write_text(MANUAL)
    return share


def install(board: Board, *options: str) -> "subprocess.CompletedProcess[str]":
    command = f"cd /mnt/share && ./install-edge.sh {' '.join(options)}"
    return board.attempt(command, timeout_seconds=INSTALL_SECONDS)


def install_from_bundle(board: Board) -> None:
    """Install on a new board, which looks for its broker at ``HOST``; return when edged is ready."""
    board.boot()
    board.mount("share")
    told = install(board, "--bundle", "/mnt/share/bundle", "--broker", f"mqtt://{HOST}:{BROKER_PORT}")
    assert told.returncode == 0, told.stdout + told.stderr + board.last_console_lines()


def wait_until(board: Board, condition: str, *, seconds: float = READY_SECONDS) -> None:
    """Return when a shell command on the board succeeds."""
    waiting = shlex.quote(f"until {condition}; do sleep 0.5; done")
    command = f"timeout {seconds:.0f} bash -c {waiting} >/dev/null 2>&1"
    board.run(command, timeout_seconds=seconds + 60)


def wait_until_ready(board: Board) -> None:
    wait_until(board, "edged status")


def show(board: Board, name: str) -> str:
    """A property of the service, as systemd has it."""
    return board.run(f"systemctl show --property {name} --value edged.service").strip()


def other_than(pid: str) -> str:
    """The condition that the daemon is another process, running."""
    return f"systemctl show --property MainPID --value edged | grep -qvx -e 0 -e {pid}"


def health(board: Board) -> dict[str, Any]:
    """What ``/health`` says now, whatever its status is."""
    _, _, body = board.run(ASK_HEALTH).partition("\n\n")  # as text, whose line ends are told as one character
    answer: dict[str, Any] = json.loads(body)
    return answer


def conditions(board: Board) -> dict[str, str]:
    """The text of each condition that holds now, by its code."""
    return {held["code"]: held["text"] for held in health(board)["conditions"]}


def reload_with(board: Board, sed: str) -> None:
    board.run(f"sed -i '{sed}' {CONFIG_FILE} && systemctl reload edged")


@contextlib.contextmanager
def configured(board: Board, settings: str) -> Iterator[None]:
    """The service, started again with these settings as well, for the time of the block."""
    board.run(f"cp -a {CONFIG_FILE} /run/edged.toml && cat >> {CONFIG_FILE}", stdin=settings)
    try:
        restart(board)
        yield
    finally:
        board.run(f"mv /run/edged.toml {CONFIG_FILE}")
        restart(board)


def restart(board: Board) -> None:
    board.run("systemctl restart edged", timeout_seconds=READY_SECONDS)
    wait_until_ready(board)
