"""The states of a worker and the moves between them."""

import itertools

import pytest

from edged.workers.state import MOVES, PINNED, KeepWarm, WorkerState, check_move


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


@pytest.mark.parametrize(
    "state", sorted(set(WorkerState) - {WorkerState.STOPPED, WorkerState.STOPPING}, key=str), ids=str
)
def test_a_worker_can_be_stopped_from_every_state_it_lives_in(state: WorkerState) -> None:
    check_move(state, WorkerState.STOPPING)


def test_what_is_stopping_only_becomes_stopped() -> None:
    assert MOVES[WorkerState.STOPPING] == {WorkerState.STOPPED}


# --- how long a model is kept ----------------------------------------------------------------------


def test_a_pinned_model_is_loaded_at_the_start_and_never_unloaded() -> None:
    assert PINNED.first_state is WorkerState.STARTING
    assert PINNED.unload_after_seconds(unfinished=0) is None


def test_an_idle_model_is_loaded_at_the_start_and_unloaded_when_nobody_asks() -> None:
    policy = KeepWarm("idle", 60.0)
    assert policy.first_state is WorkerState.STARTING
    assert policy.unload_after_seconds(unfinished=0) == 60.0


def test_a_model_on_demand_waits_to_be_asked_for_and_is_unloaded_when_nobody_asks() -> None:
    policy = KeepWarm("demand", 60.0)
    assert policy.first_state is WorkerState.UNLOADED
    assert policy.unload_after_seconds(unfinished=0) == 60.0


@pytest.mark.parametrize("policy", [PINNED, KeepWarm("idle"), KeepWarm("demand")], ids=lambda keep: keep.policy)
def test_no_model_is_unloaded_under_a_request(policy: KeepWarm) -> None:
    assert policy.unload_after_seconds(unfinished=1) is None
    check_move(WorkerState.STOPPED, policy.first_state)
