"""When a profile is worth publishing: on schedule, and sooner when something has changed that places work elsewhere."""

from collections.abc import Callable
from typing import Final

import msgspec

from edged.probe.profile import Profile, to_json
from edged.probe.profiles import Profiles

LEAST_SECONDS: Final = 10.0
NOTABLE_SCORE: Final = 0.15
NOTABLE_THROTTLING: Final = 0.1


class Published(msgspec.Struct, frozen=True):
    """What was published last, and when."""

    profile: Profile
    at: float


def due(last: Published | None, fresh: Profile, now: float, every_seconds: float) -> bool:
    """Whether to publish now; ``fresh`` is the profile of the last ten seconds."""
    if last is None or now - last.at >= every_seconds:
        return True
    return now - last.at >= LEAST_SECONDS and notable(last.profile, fresh)


def notable(before: Profile, after: Profile) -> bool:
    """Another means of measurement, other workers or models, heat, a quota that bites, or a load score far from the
    one told."""
    return _marks(before) != _marks(after) or abs(before.score.value - after.score.value) >= NOTABLE_SCORE


def _marks(profile: Profile) -> tuple[object, ...]:
    throttled = {
        name
        for name, worker in profile.workers.items()
        if worker.throttled_share is not None and worker.throttled_share.value >= NOTABLE_THROTTLING
    }
    serving = {name: worker.model for name, worker in profile.workers.items()}
    return profile.step, serving, profile.node.slowed, throttled


class Publisher:
    """Hands profiles as JSON to ``publish``, of a minute on schedule, of ten seconds on a notable change.

    :meth:`run` is one supervised service.
    """

    def __init__(self, profiles: Profiles, publish: Callable[[bytes], None], every_seconds: float) -> None:
        self._profiles = profiles
        self._publish = publish
        self._every_seconds = every_seconds
        self._last: Published | None = None

    async def run(self) -> None:
        """Watch each second until cancelled."""
        async for second in self._profiles.seconds():
            self.observe(second.at)

    def observe(self, now: float) -> None:
        """Publish where that is due."""
        fresh = self._profiles.window("10s")
        if not due(self._last, fresh, now, self._every_seconds):
            return
        on_schedule = self._last is None or now - self._last.at >= self._every_seconds
        told = self._profiles.window("1m") if on_schedule else fresh
        self._last = Published(told, now)
        self._publish(to_json(told))
