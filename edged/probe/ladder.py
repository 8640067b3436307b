"""Which means of measurement are in use, why no better ones, and when these are tried again. Pure."""

from collections.abc import Mapping
from typing import Final

from edged.probe.sample import Step
from edged.runtime.backoff import pause_seconds

FROM_THE_TOP: Final = (Step.EBPF, Step.COUNTERS, Step.PROCFS)
SMALLEST_PAUSE_SECONDS: Final = 10.0
LARGEST_PAUSE_SECONDS: Final = 1800.0
"""Between attempts that fail for a reason that was not foreseen: each costs a second or more of compiling."""

Obstacles = Mapping[Step, str]
"""Why a step cannot be had, as far as can be seen beforehand; a step without an entry can."""


class Ladder:
    """Begins at the bottom, where nothing is needed. Up to ``highest`` it climbs as far as nothing is in the way."""

    def __init__(self, highest: Step) -> None:
        self.step = Step.PROCFS
        self._highest = highest
        self._failures: dict[Step, int] = {}
        self._reasons: dict[Step, str] = {}
        self._again_at: dict[Step, float] = {}

    def attempts(self, obstacles: Obstacles, now: float) -> list[Step]:
        """The steps above this one that may be tried now, the lowest first. Once an obstacle is gone, nothing that
        failed before it is a reason to wait."""
        found = []
        for step in FROM_THE_TOP[FROM_THE_TOP.index(self._highest) : FROM_THE_TOP.index(self.step)]:
            if step in obstacles:
                self._forget(step)
            elif now >= self._again_at.get(step, now):
                found.append(step)
        return found[::-1]

    def reached(self, step: Step) -> None:
        """It works, and all below it do."""
        self.step = step
        self._forget(step)

    def failed(self, step: Step, reason: str, now: float, random: float) -> None:
        """It could not be had, or works no longer; ``random`` is in [0, 1)."""
        self._failures[step] = self._failures.get(step, 0) + 1
        self._reasons[step] = reason
        self._again_at[step] = now + pause_seconds(
            self._failures[step], smallest=SMALLEST_PAUSE_SECONDS, largest=LARGEST_PAUSE_SECONDS, random=random
        )
        if self.step is step:
            self.step = FROM_THE_TOP[FROM_THE_TOP.index(step) + 1]

    def reason(self, obstacles: Obstacles) -> str:
        """Why the next step up is not reached; empty where no higher one is wanted."""
        if self.step is self._highest:
            return ""
        above = FROM_THE_TOP[FROM_THE_TOP.index(self.step) - 1]
        return obstacles.get(above) or self._reasons.get(above, "")

    def _forget(self, step: Step) -> None:
        for known in (self._failures, self._reasons, self._again_at):
            known.pop(step, None)
