"""Other programs run for a bundle: each in a process group of its own, which never outlives its caller."""

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from edged.errors import BundleError

LINES_SHOWN: Final = 12
STOP_SECONDS: Final = 60.0  # a compilation on a busy machine needs some to end and to remove what it made
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
    command: Sequence[str | Path],
    failure: str,
    *,
    hint: str,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """The last line that the program wrote. ``on_line`` is called with each, of both its outputs.

    Raises :class:`BundleError` with ``failure`` and the last lines where the program fails or is not there.
    """
    tail: deque[str] = deque(maxlen=LINES_SHOWN)
    with _started(command, environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip())
            if on_line is not None:
                on_line(line)
    if process.returncode != 0:
        said = "".join(f"\n  | {line}" for line in tail if line)
        raise BundleError(f"{failure} (exit code {process.returncode}){said}", hint=hint, command=str(command[0]))
    return tail[-1] if tail else ""


@contextlib.contextmanager
def _started(command: Sequence[str | Path], environment: Mapping[str, str] | None) -> Iterator[subprocess.Popen[str]]:
    process = None
    try:
        with _uninterrupted():
            process = _start(command, environment)
        yield process
        process.wait()
    except BaseException:
        if process is not None:
            _stop(process)
        raise
    finally:
        if process is not None and process.stdout is not None:
            process.stdout.close()


def _start(command: Sequence[str | Path], environment: Mapping[str, str] | None) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BundleError(
            f"{command[0]} is not on this machine", hint="install it, then run the command again"
        ) from error


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What would end this program waits, so that a program that has just begun is never lost sight of."""
    held: list[int] = []
    before = {number: signal.signal(number, lambda caught, _frame: held.append(caught)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in held:
            signal.raise_signal(caught)


def _stop(process: subprocess.Popen[str]) -> None:
    """End the group: politely, so that a script removes what it made, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
