"""What a worker can be, which moves are legal, and how long its model stays in memory."""

from enum import Enum
from typing import Literal

import msgspec


class WorkerState(Enum):
    """A worker role's life: a process is started, loads, serves, dies, pauses, starts again, is stopped.

    ``UNLOADED``: there is no process because nobody asks; the next request starts one.
    """

    STOPPED = "stopped"
    UNLOADED = "unloaded"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPING = "stopping"


MOVES: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STOPPED: frozenset({WorkerState.STARTING, WorkerState.UNLOADED}),
    WorkerState.UNLOADED: frozenset({WorkerState.STARTING, WorkerState.STOPPING}),
    WorkerState.STARTING: frozenset({WorkerState.READY, WorkerState.BACKOFF, WorkerState.STOPPING}),
    WorkerState.READY: frozenset({WorkerState.UNLOADED, WorkerState.BACKOFF, WorkerState.STOPPING}),
    WorkerState.BACKOFF: frozenset({WorkerState.STARTING, WorkerState.STOPPING}),
    WorkerState.STOPPING: frozenset({WorkerState.STOPPED}),
}
"""Legal moves; anything else is a programming error."""


def check_move(old: WorkerState, new: WorkerState) -> None:
    """Raise ``ValueError`` for an illegal move."""
    if new not in MOVES[old]:
        raise ValueError(f"a worker does not go from {old.value} to {new.value}")


Warmth = Literal["pinned", "idle", "demand"]
"""``pinned`` models are loaded at the start and kept; ``idle`` ones are unloaded when nobody has asked for a while;
``demand`` ones are not even loaded before the first request."""


class KeepWarm(msgspec.Struct, frozen=True):
    """How long a model stays in memory. ``idle_seconds`` count from the end of the last request, or from loading."""

    policy: Warmth = "pinned"
    idle_seconds: float = 300.0

    @property
    def first_state(self) -> WorkerState:
        """What a worker that is told to start becomes."""
        return WorkerState.UNLOADED if self.policy == "demand" else WorkerState.STARTING

    def unload_after_seconds(self, *, unfinished: int) -> float | None:
        """When a loaded model with so many unfinished requests is unloaded, if none comes until then; None: never."""
        return None if self.policy == "pinned" or unfinished else self.idle_seconds


PINNED = KeepWarm()
