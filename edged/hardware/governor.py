"""How much is computed while the device is hot or short of power: pure.

Work is taken back before the kernel slows the CPU, because then it slows every thread at a moment of its own choosing,
and given back when the device has been cool for a while.
"""

from typing import Final

import msgspec

STEP_SECONDS: Final = 10.0
"""Heat follows work slowly: so long a step is given to show what it does."""
URGENT_STEP_SECONDS: Final = 2.0
URGENT_CELSIUS: Final = 1.0
"""So near to being slowed, or being slowed already, steps follow each other fast."""
CALM_CELSIUS: Final = 5.0
"""How much further below than where work is taken back it must be cooler, before any is given back."""
CALM_SECONDS: Final = 30.0


class Step(msgspec.Struct, frozen=True):
    """What is left of the full work: of the threads and the sequences at once, as shares (at least one of each);
    ``answer_factor`` times the shortest limit of an answer's tokens, None for no limit."""

    threads: float
    sequences: float
    answer_factor: int | None


STEPS: Final = (
    Step(1.0, 1.0, None),
    Step(1.0, 0.5, None),
    Step(0.75, 0.5, 4),
    Step(0.5, 0.25, 2),
    Step(0.0, 0.0, 1),
)
"""From full work to the least: one thread, one sequence, short answers."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """``below_celsius``: how much cooler the device is than where it is slowed (None: nobody knows).

    ``slowed``: it is slowed already. ``under_voltage``: its supply gives too little.
    """

    below_celsius: float | None
    slowed: bool = False
    under_voltage: bool = False


class Governor(msgspec.Struct, frozen=True, kw_only=True):
    """Where in :data:`STEPS` the device is; ``moved_at`` and ``calm_since`` are times of a monotonic clock, seconds.

    ``warmest_below``: the :attr:`Reading.below_celsius` that the step now taken had to do with. While the device gets
    cooler than that, no further step is needed.
    """

    level: int = 0
    moved_at: float = float("-inf")
    warmest_below: float = float("inf")
    calm_since: float | None = None

    @property
    def step(self) -> Step:
        return STEPS[self.level]

    def observe(self, reading: Reading, *, margin_celsius: float, now: float) -> "Governor":
        """The next state: work is taken back when it is no cooler than ``margin_celsius`` below the point of slowing.

        It is given back a step at a time, each after :data:`CALM_SECONDS` at least :data:`CALM_CELSIUS` cooler.
        """
        below = reading.below_celsius
        urgent = reading.slowed or reading.under_voltage or (below is not None and below <= URGENT_CELSIUS)
        if urgent or (below is not None and below <= margin_celsius):
            wait = URGENT_STEP_SECONDS if urgent else STEP_SECONDS
            cooling = not urgent and below is not None and below > self.warmest_below
            if cooling or now - self.moved_at < wait or self.level == len(STEPS) - 1:
                return msgspec.structs.replace(self, calm_since=None)
            warmest = self.warmest_below if below is None else below
            return Governor(level=self.level + 1, moved_at=now, warmest_below=warmest)
        if self.level == 0 or (below is not None and below < margin_celsius + CALM_CELSIUS):
            return msgspec.structs.replace(self, calm_since=None)
        since = now if self.calm_since is None else self.calm_since
        if now - since < CALM_SECONDS:
            return msgspec.structs.replace(self, calm_since=since)
        return Governor(level=self.level - 1, moved_at=now)
