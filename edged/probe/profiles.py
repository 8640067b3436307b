"""Where samples become profiles, and whoever wants profiles finds them: the latest, a window's, or each as it comes."""

import asyncio
from collections.abc import AsyncGenerator, Iterable

from edged.errors import ProfileUnavailableError
from edged.probe.profile import Device, Profile, Warmth, merge, profile
from edged.probe.progress import Progress, Subject
from edged.probe.rollup import Rollups, Window
from edged.probe.sample import Sample


class Profiles:
    """``latest`` is the last second; ``total`` the profile of all time since the start."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.latest: Profile | None = None
        self.total: Profile | None = None
        self._progress = Progress()
        self._rollups = Rollups()
        self._next = asyncio.Event()
        self._closed = False

    def add(self, sample: Sample, subjects: Iterable[Subject], warmth: Warmth) -> None:
        """The next second; whoever waits for it hears of it."""
        self._progress, works = self._progress.observe(subjects)
        self.latest = profile(sample, self.device, works, warmth)
        self.total = self.latest if self.total is None else merge([self.total, self.latest])
        self._rollups.add(self.latest)
        came, self._next = self._next, asyncio.Event()
        came.set()

    def window(self, window: Window) -> Profile:
        """The latest profile of that length. Raises :class:`ProfileUnavailableError`."""
        found = self._rollups.window(window)
        if found is None:
            raise ProfileUnavailableError(
                "nothing has been measured yet", hint="ask again in a second; probe.enabled must be true"
            )
        return found

    async def seconds(self) -> AsyncGenerator[Profile, None]:
        """Each second until :meth:`close`, but for those that came while the one before was still being used."""
        while not self._closed:
            await self._next.wait()
            if self.latest is not None and not self._closed:
                yield self.latest

    def close(self) -> None:
        """End all iterations: nobody is to wait for seconds that nobody will measure."""
        self._closed = True
        self._next.set()
