"""What an answer may cost to be there in time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.rag.degrade import MARGIN_SECONDS, REDUCED_ANSWER_TOKENS, Speed, plan

FAST = Speed(prefill_tokens_per_second=300.0, decode_tokens_per_second=100.0)
STEPS = ["passages", "reduced", "generated"]


def test_without_a_deadline_everything_asked_for_is_spent() -> None:
    chosen = plan(None, Speed(0.001, 0.001), fact_tokens=160, max_tokens=96)
    assert (chosen.step, chosen.budget_tokens, chosen.max_tokens) == ("generated", 160, 96)


def test_a_comfortable_deadline_changes_nothing() -> None:
    assert plan(10.0, FAST, fact_tokens=160, max_tokens=96) == plan(None, FAST, fact_tokens=160, max_tokens=96)


def test_a_nearer_deadline_halves_the_sentences_and_shortens_the_answer() -> None:
    chosen = plan(1.0, FAST, fact_tokens=160, max_tokens=96)
    assert (chosen.step, chosen.budget_tokens, chosen.max_tokens) == ("reduced", 80, REDUCED_ANSWER_TOKENS)


@pytest.mark.parametrize("seconds_left", [0.2, 0.0, -3.0])
def test_too_near_a_deadline_leaves_the_passages(seconds_left: float) -> None:
    chosen = plan(seconds_left, FAST, fact_tokens=160, max_tokens=96)
    assert chosen.step == "passages"


def test_a_short_answer_is_never_lengthened_by_degrading() -> None:
    assert plan(0.8, FAST, fact_tokens=160, max_tokens=4).max_tokens <= 4


@given(st.floats(0.0, 30.0), st.floats(0.0, 30.0), st.floats(1.0, 1000.0), st.floats(1.0, 300.0), st.integers(16, 2000))
def test_more_time_never_makes_a_poorer_answer(
    first: float, second: float, prefill: float, decode: float, budget: int
) -> None:
    speed = Speed(prefill, decode)
    less, more = sorted((first, second))
    steps = [plan(left, speed, fact_tokens=budget, max_tokens=96).step for left in (less, more)]
    assert STEPS.index(steps[0]) <= STEPS.index(steps[1])


@given(st.floats(0.0, 30.0), st.floats(1.0, 1000.0), st.floats(1.0, 300.0))
def test_what_is_chosen_fits_the_time_left(left: float, prefill: float, decode: float) -> None:
    speed = Speed(prefill, decode)
    chosen = plan(left, speed, fact_tokens=160, max_tokens=24)
    if chosen.step != "passages":
        needed = speed.seconds(prompt_tokens=chosen.budget_tokens, answer_tokens=chosen.max_tokens)
        assert needed + MARGIN_SECONDS <= left


def test_the_speed_follows_what_is_seen() -> None:
    speed = Speed()
    for _ in range(60):
        speed = speed.observe(prompt_tokens=200, prefill_ms=1000.0, answer_tokens=50, generate_ms=500.0)
    assert speed.prefill_tokens_per_second == pytest.approx(200.0, rel=0.01)
    assert speed.decode_tokens_per_second == pytest.approx(100.0, rel=0.01)


def test_an_answer_of_a_few_tokens_says_nothing_about_the_speed() -> None:
    speed = Speed()
    assert speed.observe(prompt_tokens=3, prefill_ms=0.1, answer_tokens=1, generate_ms=0.0) == speed
