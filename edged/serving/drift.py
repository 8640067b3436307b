"""What drifted of late and who did it: the one is seen in affinities and cgroups, the other told by the profile, in
either order. Pure."""

from typing import Final

import msgspec

SHOW_SECONDS: Final = 30.0
"""A drift is repaired within a second; it is named for so long, or nobody would see it."""
BLAME_SECONDS: Final = 3.0
"""So near to each other, a changed affinity and who called for it belong together."""


class _Told(msgspec.Struct, frozen=True):
    at: float
    pid: int
    text: str


class Drifts:
    """By kind of drift the latest; times are of one clock, in seconds."""

    def __init__(self) -> None:
        self._found: dict[str, _Told] = {}
        self._blamed: dict[tuple[str, int], _Told] = {}

    def find(self, kind: str, pid: int, text: str, now: float) -> None:
        """A process was found other than planned."""
        self._found[kind] = _Told(now, pid, text)

    def blame(self, kind: str, pid: int, culprit: str, now: float) -> None:
        """Somebody changed something of a process; the latest is remembered as long as it can be told."""
        kept = now - SHOW_SECONDS - BLAME_SECONDS
        self._blamed = {each: blamed for each, blamed in self._blamed.items() if blamed.at >= kept}
        self._blamed[kind, pid] = _Told(now, pid, culprit)

    def text(self, kind: str, now: float) -> str:
        """What to say of a kind now; empty when it is over."""
        found = self._found.get(kind)
        if found is None or now - found.at >= SHOW_SECONDS:
            self._found.pop(kind, None)
            return ""
        blamed = self._blamed.get((kind, found.pid))
        if blamed is None or abs(blamed.at - found.at) > BLAME_SECONDS:
            return found.text
        return f"{found.text}, {blamed.text}"
