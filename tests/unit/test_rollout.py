"""The life of a model: legal moves, one active model whatever happens, and what counts as worse."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.models.rollout import (
    MOVES,
    Limits,
    Lineup,
    Observed,
    Report,
    Stage,
    active,
    canary_verdict,
    choose,
    golden_regression,
    move,
    recovery,
    regression,
    way_out,
)

LIMITS = Limits(more_failures=0.05, less_valid=0.1, less_overlap=0.15, slowest=0.5, heaviest=2.0)
MODELS = ("one", "two", "three")
GOOD = Report(valid=True, overlap=0.9, tokens=50, seconds=1.0)
lineups = st.dictionaries(st.sampled_from(MODELS), st.sampled_from(Stage)).filter(
    lambda lineup: list(lineup.values()).count(Stage.ACTIVE) <= 1
)


def observed(report: Report, times: int) -> Observed:
    found = Observed()
    for _ in range(times):
        found = found.add(report)
    return found


@given(st.lists(st.tuples(st.sampled_from(MODELS), st.sampled_from(Stage))))
def test_no_order_of_moves_leaves_two_active_models(moves: list[tuple[str, Stage]]) -> None:
    lineup: Lineup = {}
    for model, stage in moves:
        try:
            lineup, step = move(lineup, model, stage)
        except ValueError:
            continue
        assert step.old is None or step.new in MOVES[step.old]
        assert list(lineup.values()).count(Stage.ACTIVE) <= 1


@pytest.mark.parametrize(("old", "new"), list(itertools.product(Stage, Stage)))
def test_a_move_that_is_not_in_the_table_is_refused(old: Stage, new: Stage) -> None:
    if new in MOVES[old]:
        assert move({"one": old}, "one", new)[0] == {"one": new}
    else:
        with pytest.raises(ValueError, match="does not go"):
            move({"one": old}, "one", new)


def test_a_second_model_cannot_become_active() -> None:
    with pytest.raises(ValueError, match="one is"):
        move({"one": Stage.ACTIVE, "two": Stage.CANARY}, "two", Stage.ACTIVE)


@given(lineups, st.sampled_from((*MODELS, "four", None)))
def test_after_any_end_of_the_daemon_one_model_is_active_and_every_step_to_it_is_legal(
    lineup: dict[str, Stage], serving: str | None
) -> None:
    now: Lineup = lineup
    for step in recovery(lineup, serving):
        now, again = move(now, step.model, step.new)
        assert again == step
    assert active(now) == serving
    assert {stage for model, stage in now.items() if model != serving} <= {Stage.RETIRED}


@given(st.sampled_from(Stage))
def test_there_is_a_way_out_from_every_stage(stage: Stage) -> None:
    lineup: Lineup = {"one": stage}
    for step in way_out(lineup, "one"):
        lineup, _ = move(lineup, "one", step)
    assert lineup["one"] is Stage.RETIRED


def test_what_was_activated_is_served_until_the_configuration_names_another() -> None:
    assert choose("a", None) == "a"
    assert choose("a", ("b", "a")) == "b"
    assert choose("c", ("b", "a")) == "c"


@pytest.mark.parametrize(
    ("worse", "reason"),
    [
        (Report(failed=True), "100% of its requests failed"),
        (Report(valid=False, overlap=0.9, tokens=50, seconds=1.0), "only 0% of its answers"),
        (Report(valid=True, overlap=0.5, tokens=50, seconds=1.0), "only 50% of its text"),
        (Report(valid=True, overlap=0.9, tokens=50, seconds=3.0), "16.7 tokens/s where the active model makes 50.0"),
    ],
)
def test_a_regression_is_told_in_a_sentence(worse: Report, reason: str) -> None:
    found = regression(observed(GOOD, 10), observed(worse, 10), LIMITS)
    assert found is not None
    assert reason in found


def test_a_model_as_good_as_the_active_one_is_no_regression() -> None:
    assert regression(observed(GOOD, 10), observed(GOOD, 3), LIMITS) is None


def test_what_is_unknown_of_one_model_is_not_compared() -> None:
    assert regression(Observed(), observed(Report(valid=False, tokens=1, seconds=9.0), 5), LIMITS) is None
    assert regression(observed(GOOD, 5), Observed(), LIMITS) is None


def test_more_memory_than_allowed_is_a_regression() -> None:
    found = regression(Observed(rss_bytes=100_000_000), Observed(rss_bytes=250_000_000), LIMITS)
    assert found == "its worker takes 250 MB of memory, the active model's 100 MB"
    assert regression(Observed(), Observed(rss_bytes=250_000_000), LIMITS) is None


@pytest.mark.parametrize(
    ("baseline", "candidate", "passes"),
    [
        ([True, True], [True, True], True),
        ([True, False], [False, True], True),
        ([True, True], [True, False], False),
        ([False, False], [False, False], False),
        ([], [True, True], True),
        ([], [True, False], False),
        ([], [], True),
    ],
)
def test_a_candidate_passes_as_many_golden_questions_as_the_active_model(
    baseline: list[bool], candidate: list[bool], passes: bool
) -> None:
    assert (golden_regression(baseline, candidate) is None) == passes


def verdict(candidate: Observed, elapsed: float = 1.0) -> str:
    return canary_verdict(
        observed(GOOD, 100), candidate, LIMITS, enough=40, elapsed_seconds=elapsed, longest_seconds=60
    )[0]


def test_enough_good_canary_requests_promote() -> None:
    assert verdict(observed(GOOD, 39)) == "wait"
    assert verdict(observed(GOOD, 40)) == "promote"


def test_a_bad_canary_is_taken_back_before_all_its_requests_are_in() -> None:
    failing = observed(Report(failed=True), 10)
    assert verdict(observed(Report(failed=True), 9)) == "wait"
    assert verdict(failing) == "roll back"


def test_the_time_limit_decides_with_what_there_is() -> None:
    assert verdict(observed(GOOD, 3), elapsed=60) == "promote"
    assert verdict(observed(Report(failed=True), 1), elapsed=60) == "roll back"
    assert verdict(Observed(), elapsed=60) == "promote"


@given(st.lists(st.builds(Report, failed=st.booleans(), valid=st.none() | st.booleans(), tokens=st.integers(0, 99))))
def test_a_model_is_never_worse_than_itself(reports: list[Report]) -> None:
    found = Observed()
    for report in reports:
        found = found.add(report)
    assert regression(found, found, LIMITS) is None
