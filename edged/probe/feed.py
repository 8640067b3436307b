"""Where the daemon's samples come from: the probe, while there is one; else this process measures what it may itself.

Two supervised services: :meth:`Feed.follow` keeps the connection, :meth:`Feed.stand_in` measures while there is none.
"""

import asyncio
import contextlib
import random
import socket
import struct
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec
import structlog

from edged.errors import ProbeError
from edged.probe.protocol import Watch, decode_sample, encode
from edged.probe.sample import Sample, Step, Watched
from edged.probe.sampler import Sampler
from edged.runtime import health as conditions
from edged.runtime.backoff import pause_seconds
from edged.runtime.health import Health
from edged.workers.protocol import FrameBuffer, FrameError

SAMPLE_EVERY_SECONDS: Final = 1.0
SILENT_AFTER_SECONDS: Final = 5.0
SMALLEST_PAUSE_SECONDS: Final = 1.0
LARGEST_PAUSE_SECONDS: Final = 30.0


class Link(Enum):
    """To the probe: not yet known, heard from it, or missing."""

    UNKNOWN = "unknown"
    HEARD = "heard"
    MISSING = "missing"


MOVES: Final[dict[Link, frozenset[Link]]] = {
    Link.UNKNOWN: frozenset({Link.HEARD, Link.MISSING}),
    Link.HEARD: frozenset({Link.MISSING}),
    Link.MISSING: frozenset({Link.HEARD}),
}


class Pauses(msgspec.Struct, frozen=True, kw_only=True):
    """How long a silent probe is listened to, and the shortest and longest pause before it is tried again, seconds."""

    silent: float = SILENT_AFTER_SECONDS
    smallest: float = SMALLEST_PAUSE_SECONDS
    largest: float = LARGEST_PAUSE_SECONDS


class Feed:
    """Hands every sample to ``on_sample``; ``watched`` is asked each second what to measure."""

    def __init__(
        self,
        path: Path,
        watched: Callable[[], Sequence[Watched]],
        on_sample: Callable[[Sample], None],
        health: Health,
        *,
        stand_in: Callable[[], Sampler] = lambda: Sampler(Step.COUNTERS),
        pauses: Pauses = Pauses(),  # noqa: B008  # frozen
    ) -> None:
        """``path`` is the probe's socket; ``stand_in`` makes the sampler of this process, and may block."""
        self._path = path
        self._watched = watched
        self._on_sample = on_sample
        self._health = health
        self._make_stand_in = stand_in
        self._pauses = pauses
        self._link = Link.UNKNOWN
        self._why = ""
        self._missing, self._heard = asyncio.Event(), asyncio.Event()
        self._log = structlog.get_logger("probe")

    @property
    def link(self) -> Link:
        return self._link

    # --- the probe -------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Listen to the probe, and try again when it is away, until cancelled."""
        failures = 0
        while True:
            reason = await self._listen()
            failures = 1 if self._link is Link.HEARD else failures + 1
            self._why = reason
            self._move(Link.MISSING)
            await asyncio.sleep(
                pause_seconds(
                    failures,
                    smallest=self._pauses.smallest,
                    largest=self._pauses.largest,
                    random=random.random(),  # noqa: S311 - jitter, no secret
                )
            )

    async def _listen(self) -> str:
        """One connection from beginning to end; returns why it ended."""
        try:
            async with _connection(self._path) as (reader, writer):
                return await self._take(reader, writer)
        except TimeoutError:
            return f"the probe said nothing for {self._pauses.silent:g} s"
        except OSError as error:
            return f"no probe answers at {self._path}: {error.strerror or error}"
        except (ProbeError, FrameError) as error:
            return str(error)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        frames = FrameBuffer()
        told: tuple[Watched, ...] = ()
        while True:
            told = self._tell(writer, told)
            async with asyncio.timeout(self._pauses.silent):
                data = await reader.read(1 << 16)
            if not data:
                return "the probe ended the connection"
            for payload in frames.feed(data):
                sample = decode_sample(payload)
                self._move(Link.HEARD)
                self._pass_on(sample)

    def _tell(self, writer: asyncio.StreamWriter, told: tuple[Watched, ...]) -> tuple[Watched, ...]:
        """Say what to watch where that has changed; returns it."""
        wanted = tuple(self._watched())
        if wanted != told:
            writer.write(encode(Watch(wanted)))
        return wanted

    # --- this process ----------------------------------------------------------------------------------

    async def stand_in(self) -> None:
        """Measure with this process's own rights whenever the probe is missing, until cancelled."""
        while True:
            await self._missing.wait()
            # One thread of its own: the sampler counts the time of its thread as what measuring costs.
            executor = ThreadPoolExecutor(1, "probe-stand-in")
            stand_in = _StandIn(self._make_stand_in)
            try:
                await self._measure(executor, stand_in)
            finally:
                executor.submit(stand_in.close)
                await asyncio.to_thread(executor.shutdown)

    async def _measure(self, executor: ThreadPoolExecutor, stand_in: "_StandIn") -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self._link is Link.MISSING:
            await loop.run_in_executor(executor, stand_in.watch, tuple(self._watched()))
            due = max(due + SAMPLE_EVERY_SECONDS, loop.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._heard.wait()
            sample = await loop.run_in_executor(executor, stand_in.sample, time.time())
            if self._link is Link.MISSING:
                self._pass_on(msgspec.structs.replace(sample, reason=_joined(self._why, sample.reason)))

    # --- both ------------------------------------------------------------------------------------------

    def _pass_on(self, sample: Sample) -> None:
        told = f"measured by {sample.step.value}: {sample.reason}"
        missing = self._link is Link.MISSING
        self._show(conditions.PROBE_ABSENT, told, holds=missing)
        self._show(conditions.PROBE_REDUCED, told, holds=not missing and sample.step is not Step.EBPF)
        self._on_sample(sample)

    def _show(self, kind: conditions.ConditionKind, text: str, *, holds: bool) -> None:
        if holds:
            self._health.set(kind, text)
        else:
            self._health.clear(kind)

    def _move(self, link: Link) -> None:
        if link is self._link:
            return
        if link not in MOVES[self._link]:
            raise ValueError(f"the link does not go from {self._link.value} to {link.value}")
        self._log.info("probe_link", old=self._link.value, new=link.value, why=self._why)
        self._link = link
        came, went = (self._heard, self._missing) if link is Link.HEARD else (self._missing, self._heard)
        went.clear()
        came.set()


class _StandIn:
    """A sampler in its thread, made when it is first used: whoever waits for it may be cancelled at any moment."""

    def __init__(self, make: Callable[[], Sampler]) -> None:
        self._make = make
        self._sampler: Sampler | None = None
        self._told: tuple[Watched, ...] | None = None

    def watch(self, wanted: tuple[Watched, ...]) -> None:
        if self._sampler is None:
            self._sampler = self._make()
        if wanted != self._told:
            self._sampler.watch(wanted)
            self._told = wanted

    def sample(self, now: float) -> Sample:
        assert self._sampler is not None
        return self._sampler.sample(now)

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


@contextlib.asynccontextmanager
async def _connection(path: Path) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter], None]:
    """A connection to the probe. Raises ``OSError``, and :class:`ProbeError` where somebody else listens there."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        owner = (await asyncio.to_thread(path.parent.stat)).st_uid
        user = _peer_user(writer.get_extra_info("socket"))
        # Who may make a socket in that folder is who systemd made it for, or root.
        if user not in (0, owner):
            raise ProbeError(f"user {user} listens at {path}, not {owner}", hint="correct probe.socket")
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def _peer_user(connection: socket.socket) -> int:
    """User id of the peer, from SO_PEERCRED of unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
