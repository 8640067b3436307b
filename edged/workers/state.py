"""What a worker can be, and which moves are legal."""

from enum import Enum


class WorkerState(Enum):
    """A worker role's life: a process is started, loads, serves, dies, pauses, starts again, is stopped."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPING = "stopping"


MOVES: dict[WorkerState, frozenset[WorkerState]] = {
    WorkerState.STOPPED: frozenset({WorkerState.STARTING}),
    WorkerState.STARTING: frozenset({WorkerState.READY, WorkerState.BACKOFF, WorkerState.STOPPING}),
    WorkerState.READY: frozenset({WorkerState.BACKOFF, WorkerState.STOPPING}),
    WorkerState.BACKOFF: frozenset({WorkerState.STARTING, WorkerState.STOPPING}),
    WorkerState.STOPPING: frozenset({WorkerState.STOPPED}),
}
"""Legal moves; anything else is a programming error."""


def check_move(old: WorkerState, new: WorkerState) -> None:
    """Raise ``ValueError`` for an illegal move."""
    if new not in MOVES[old]:
        raise ValueError(f"a worker does not go from {old.value} to {new.value}")
