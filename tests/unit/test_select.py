"""Selection: what is worth prompt tokens, within the budget and in reading order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.rag.select import Candidate, estimate_tokens, score, select
from edged.types import Sentence


def candidate(text: str, rank: int = 0, index: int = 0, similarity: float | None = None) -> Candidate:
    return Candidate(rank, index, Sentence(text, 0, len(text)), similarity)


def texts(candidates: list[Candidate]) -> list[str]:
    return [chosen.sentence.text for chosen in candidates]


def test_words_of_the_question_win_and_rare_ones_count_more() -> None:
    """A sentence with the question's rare word beats one with its common word."""
    candidates = [
        candidate("The pump is blue.", index=0),
        candidate("Unrelated talk entirely.", index=2),
        candidate("The cavitation begins here.", index=4),
        candidate("A pump is a machine.", index=6),
    ]
    scores = score("When does pump cavitation begin?", candidates)
    assert max(scores) == scores[2]
    assert min(scores) == scores[1]


def test_similarity_decides_where_words_do_not() -> None:
    """Of two sentences without common words the more similar one wins."""
    far, near = score("Why so hot?", [candidate("aaa", 0, 0, 0.1), candidate("bbb", 0, 5, 0.6)])
    assert near > far


@pytest.mark.parametrize("written", ["E-217", "E217", "e-217"])
def test_a_code_of_the_question_is_found_in_any_spelling(written: str) -> None:
    """The row of the fault asked for beats a more similar row of another fault."""
    wrong = candidate("Code: E-218; Meaning: dry run", index=0, similarity=0.7)
    right = candidate(f"Code: {written}; Meaning: too hot", index=5, similarity=0.6)
    assert select("What does E-217 mean?", [wrong, right], budget_tokens=1) == [right]


def test_a_neighbour_of_a_good_sentence_is_worth_more() -> None:
    """The sentence that follows the one asked about beats an equal one far away."""
    candidates = [
        candidate("The relief valve protects the tank.", 0, 0),
        candidate("It opens early.", 0, 1),
        candidate("It closes late.", 0, 7),
    ]
    _, beside, apart = score("What about the relief valve of the tank?", candidates)
    assert beside > apart


def test_better_passages_win_ties() -> None:
    """Of two equal sentences the one of the better passage comes first."""
    first, second = score("pump", [candidate("The pump.", 0), candidate("The pump.", 1)])
    assert first > second


def test_the_result_is_in_reading_order() -> None:
    """However they score, sentences come as the documents have them."""
    candidates = [candidate("A pump hums.", 1, 0), candidate("It rains.", 0, 3), candidate("Pump pressure.", 0, 9)]
    chosen = select("pump pressure", candidates, budget_tokens=100)
    assert [(each.passage_rank, each.index) for each in chosen] == [(0, 3), (0, 9), (1, 0)]


def test_near_duplicates_are_paid_once() -> None:
    """A sentence repeated by another passage is left out."""
    candidates = [candidate("Open the valve slowly.", 0), candidate("Open the valve  slowly.", 1)]
    assert len(select("open valve", candidates, budget_tokens=100)) == 1


def test_sentences_far_behind_the_best_one_are_left_out_whatever_room_there_is() -> None:
    """The best one is always there, and what is as near to it as the margin."""
    candidates = [candidate("aaa", 0, 0, 0.9), candidate("bbb", 0, 5, 0.5), candidate("ccc", 0, 9, 0.3)]
    chosen = [texts(select("Why?", candidates, budget_tokens=100, margin=margin)) for margin in (0.0, 0.5, 1.0)]
    assert chosen == [["aaa"], ["aaa", "bbb"], ["aaa", "bbb", "ccc"]]


def test_at_least_one_sentence_even_over_budget() -> None:
    """A single sentence over the budget is still better than none, and none stays none."""
    assert len(select("pump", [candidate("pump " * 300), candidate("pump")], budget_tokens=5)) == 1
    assert select("pump", [], budget_tokens=5) == []


@given(
    st.text(max_size=40),
    st.lists(st.tuples(st.text(min_size=1, max_size=60), st.floats(-1, 1) | st.none()), max_size=12),
    st.integers(0, 80),
)
def test_the_budget_holds(question: str, sentences: list[tuple[str, float | None]], budget: int) -> None:
    """Beyond the first sentence the estimate never exceeds the budget; nothing is invented or repeated."""
    candidates = [candidate(text, at // 4, at % 4, similarity) for at, (text, similarity) in enumerate(sentences)]
    chosen = select(question, candidates, budget_tokens=budget)
    places = [(each.passage_rank, each.index) for each in chosen]
    assert places == sorted(set(places))
    assert bool(chosen) == bool(candidates)
    if len(chosen) > 1:
        assert sum(estimate_tokens(each.sentence.text) for each in chosen) <= budget


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 0, 0),
        ("The pump runs at 1500 rpm.", 9, 14),
        ("泵的压力过高。", 7, 16),
        ("E-217", 5, 6),
    ],
)
def test_estimates_are_near_what_tokenizers_say(text: str, least: int, most: int) -> None:
    """Digits and marks count one each, words by length, Chinese by character."""
    assert least <= estimate_tokens(text) <= most
