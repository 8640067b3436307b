"""The states of a worker and the moves between them."""

import itertools

import pytest

from edged.workers.state import MOVES, WorkerState, check_move


def test_every_state_has_its_moves_and_can_be_reached() -> None:
    assert set(MOVES) == set(WorkerState)
    assert set().union(*MOVES.values()) == set(WorkerState)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(WorkerState, WorkerState)))
def test_exactly_the_moves_of_the_table_are_legal(old: WorkerState, new: WorkerState) -> None:
    if new in MOVES[old]:
        check_move(old, new)
        return
    with pytest.raises(ValueError, match=f"from {old.value} to {new.value}"):
        check_move(old, new)


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.READY, WorkerState.BACKOFF], ids=str)
def test_a_worker_can_be_stopped_from_every_state_it_lives_in(state: WorkerState) -> None:
    check_move(state, WorkerState.STOPPING)


def test_what_is_stopping_only_becomes_stopped() -> None:
    assert MOVES[WorkerState.STOPPING] == {WorkerState.STOPPED}
