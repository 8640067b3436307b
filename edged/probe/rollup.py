"""The last second, ten seconds, minute and quarter of an hour, in bounded memory. Pure."""

from collections import deque
from typing import Final, Literal

from edged.probe.profile import Profile, merge

Window = Literal["1s", "10s", "1m", "15m"]
WINDOWS: Final[tuple[Window, ...]] = ("1s", "10s", "1m", "15m")

A_TEN: Final = 10
TENS_A_MINUTE: Final = 6
MINUTES: Final = 15


class Rollups:
    """Ten seconds, six times ten seconds and fifteen minutes are kept as they are, older ones merged into the next.

    ``1m`` and ``15m`` so are of at least the time they are named after, once it has passed, and of at most one part
    more: 60 to 69 seconds, 15 to 16 minutes.
    """

    def __init__(self) -> None:
        self._seconds: deque[Profile] = deque(maxlen=A_TEN)
        self._tens: deque[Profile] = deque(maxlen=TENS_A_MINUTE)
        self._minutes: deque[Profile] = deque(maxlen=MINUTES)
        self._loose_seconds: list[Profile] = []
        self._loose_tens: list[Profile] = []

    def add(self, second: Profile) -> None:
        """The next second."""
        self._seconds.append(second)
        self._loose_seconds.append(second)
        if len(self._loose_seconds) < A_TEN:
            return
        ten = merge(self._loose_seconds)
        self._loose_seconds = []
        self._tens.append(ten)
        self._loose_tens.append(ten)
        if len(self._loose_tens) == TENS_A_MINUTE:
            self._minutes.append(merge(self._loose_tens))
            self._loose_tens = []

    def window(self, window: Window) -> Profile | None:
        """The profile of the latest such window; None before the first second."""
        parts: list[Profile]
        match window:
            case "1s":
                parts = list(self._seconds)[-1:]
            case "10s":
                parts = list(self._seconds)
            case "1m":
                parts = [*self._tens, *self._loose_seconds]
            case "15m":
                parts = [*self._minutes, *self._loose_tens, *self._loose_seconds]
        return merge(parts) if parts else None
