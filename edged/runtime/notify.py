"""What the service manager is told and what it hands over: sd_notify(3) and sd_listen_fds(3), over the plain protocol.

Without systemd nothing is told to anybody, and nothing is handed over.
"""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from edged.errors import StoreError

FIRST_INHERITED_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
FEEDS_PER_WATCHDOG_TIME = 3
LONGEST_STATUS_CHARACTERS = 200


class Notifier:
    """One datagram a message to ``$NOTIFY_SOCKET``; ``watchdog_seconds`` is how long the manager waits for a sign.

    A manager that does not listen costs a message, never an error: the service serves on without being watched.
    """

    def __init__(self, address: str | None = None, *, watchdog_seconds: float | None = None) -> None:
        self._address = address
        self.watchdog_seconds = watchdog_seconds if address is not None else None

    @classmethod
    def of(cls, environment: Mapping[str, str], pid: int) -> "Notifier":
        """As ``$NOTIFY_SOCKET``, ``$WATCHDOG_USEC`` and ``$WATCHDOG_PID`` say to the process ``pid``."""
        address = environment.get("NOTIFY_SOCKET")
        if address is None or address[:1] not in ("/", "@"):
            return cls()
        microseconds = environment.get("WATCHDOG_USEC", "")
        watched = microseconds.isdigit() and environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        return cls(address, watchdog_seconds=int(microseconds) / 1e6 if watched else None)

    def ready(self) -> None:
        """The doors are open and the stores answer; also the end of :meth:`reloading`."""
        self._send("READY=1")

    def reloading(self) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send("STATUS=" + " ".join(text.split())[:LONGEST_STATUS_CHARACTERS])

    def _send(self, *assignments: str) -> None:
        if self._address is None:
            return
        # A leading @ names an abstract socket, whose first byte is zero: unix(7).
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.sendto("\n".join(assignments).encode(), address)
        except OSError as error:  # nobody listens, or this process has no descriptor left
            structlog.get_logger("notify").warning("notify_failed", told=assignments[0], reason=str(error))


async def feed_watchdog(notifier: Notifier, answers: Callable[[], Awaitable[None]]) -> None:
    """Feed the watchdog while this loop turns and ``answers`` returns: a supervised service.

    What :class:`StoreError` says is logged, and who hangs is not waited for twice: either way nothing is fed, and the
    manager starts the service again. Returns at once where nobody watches.
    """
    if notifier.watchdog_seconds is None:
        return
    pause_seconds = notifier.watchdog_seconds / FEEDS_PER_WATCHDOG_TIME
    while True:
        try:
            await answers()
        except StoreError as error:
            structlog.get_logger("notify").error("watchdog_not_fed", reason=error.message)
        else:
            notifier.alive()
        await asyncio.sleep(pause_seconds)


def inherited_listeners(environment: Mapping[str, str], pid: int) -> list[socket.socket]:
    """The listening sockets that the service manager opened for the process ``pid``: socket activation.

    Call it once: the sockets are this process's from then on, and no child gets them.
    """
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(pid) or not count.isdigit():
        return []
    descriptors = range(FIRST_INHERITED_DESCRIPTOR, FIRST_INHERITED_DESCRIPTOR + int(count))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]
