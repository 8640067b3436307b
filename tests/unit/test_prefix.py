"""Which states are kept, and for how much of a prompt one may stand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edged.engine.prefix import SHORTEST_REUSE_TOKENS, PrefixCache, State, common, token_array, usable
from edged.engine.scheduler import GRID_TOKENS


def state(tokens: list[int], size: int = 100, prompt: int | None = None) -> State:
    return State(token_array(tokens), bytes(size), len(tokens) if prompt is None else prompt)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_the_common_prefix_is_what_comparing_one_by_one_finds(one: list[int], other: list[int]) -> None:
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common(token_array(one), token_array(other)) == expected


def test_a_state_stands_for_a_prompt_up_to_the_last_cut_of_what_they_share() -> None:
    kept = state(list(range(400)))
    assert usable(kept, token_array([*range(340), 999]), prefix_tokens=0) == GRID_TOKENS
    assert usable(kept, token_array([*range(340), 999]), prefix_tokens=335) == 335
    assert usable(kept, token_array(range(30)), prefix_tokens=0) == 0


def test_of_a_conversation_also_what_was_generated_is_used_again() -> None:
    kept = state(list(range(150)), prompt=100)
    assert usable(kept, token_array([*range(150), 1, 2]), prefix_tokens=70) == 150
    assert usable(kept, token_array([*range(90), 1, 2]), prefix_tokens=70) == 70


def test_at_least_one_token_is_left_to_compute() -> None:
    same = list(range(GRID_TOKENS))
    assert usable(state(same), token_array(same), prefix_tokens=0) == 0
    assert usable(state(same, prompt=10), token_array(same), prefix_tokens=0) == GRID_TOKENS - 1


def test_too_little_to_be_worth_it_is_not_used() -> None:
    few = list(range(SHORTEST_REUSE_TOKENS - 1))
    assert usable(state([*few, 7]), token_array([*few, 8, 9]), prefix_tokens=len(few)) == 0


def test_the_state_unused_for_longest_goes_first() -> None:
    cache = PrefixCache(450)
    first, second, third = (state([number] * 20) for number in (1, 2, 3))
    for each in (first, second):
        cache.put(each)
    assert cache.best(token_array([1] * 30), prefix_tokens=20) == (20, first)
    cache.put(third)
    assert cache.best(token_array([2] * 30), prefix_tokens=20) == (0, None)
    assert cache.best(token_array([1] * 30), prefix_tokens=20) == (20, first)
    assert len(cache) == 2


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 400)), max_size=20), st.integers(0, 600))
def test_the_states_never_exceed_the_limit_and_their_bytes_are_counted_right(
    puts: list[tuple[int, int]], limit: int
) -> None:
    cache = PrefixCache(600)
    for number, size in puts:
        cache.put(state([number] * 5, size))
        assert cache.bytes <= 600
        assert cache.holds(token_array([number] * 5)) == (size + 20 <= 600)
    cache.limit(limit)
    assert cache.bytes <= limit
    for number in range(5):
        if cache.holds(token_array([number] * 5)):
            cache.forget(state([number] * 5))
    assert (cache.bytes, len(cache)) == (0, 0)


def test_a_cache_without_room_is_off() -> None:
    assert not PrefixCache(0).enabled
    assert np.array_equal(token_array([1, 2]), [1, 2])
