"""Fusion of rankings, and the ranking by best sentence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.rag.fuse import fuse
from edged.rag.retrieve import by_best_sentence, holds_codes, named_codes
from edged.store.knowledge import StoredPassage
from edged.types import Passage, Sentence

IDS = st.lists(st.integers(0, 50), unique=True, max_size=12)


def stored(chunk_id: int, *vectors: tuple[float, float]) -> StoredPassage:
    sentences = tuple(Sentence("A sentence.", 0, 11) for _ in vectors)
    passage = Passage(chunk_id, "document", "Title", (), sentences)
    return StoredPassage(passage, np.array(vectors, np.float32).reshape(-1, 2))


def test_one_ranking_comes_back_as_it_is() -> None:
    assert fuse([(1.0, [7, 3, 5])]) == [7, 3, 5]


def test_what_two_methods_rank_high_beats_what_one_ranks_first() -> None:
    assert fuse([(1.0, [1, 2, 3]), (1.0, [4, 2, 5])])[0] == 2


def test_a_heavier_ranking_decides() -> None:
    assert fuse([(1.0, [1, 2]), (3.0, [2, 1])]) == [2, 1]


def test_ties_go_to_the_smaller_id() -> None:
    assert fuse([(1.0, [9]), (1.0, [4])]) == [4, 9]


def test_a_small_constant_makes_first_places_count() -> None:
    rankings = [(1.0, [1, 2, 3, 4]), (1.0, [4, 5, 6, 2]), (1.0, [1, 9, 8, 2])]
    assert fuse(rankings, constant=0.5)[0] == 1
    assert fuse(rankings, constant=1000.0)[0] == 2


def test_nothing_fused_is_nothing() -> None:
    assert fuse([]) == []
    assert fuse([(1.0, [])]) == []


@given(st.lists(IDS, max_size=4))
def test_every_id_comes_back_exactly_once(rankings: list[list[int]]) -> None:
    fused = fuse([(1.0, ids) for ids in rankings])
    assert sorted(fused) == sorted({item for ids in rankings for item in ids})


@given(IDS)
def test_an_unanimous_order_is_kept(ids: list[int]) -> None:
    assert fuse([(1.0, ids), (0.5, ids), (2.0, ids)]) == ids


def test_passages_are_ranked_by_their_best_sentence_not_by_their_mean() -> None:
    question = np.array([1.0, 0.0], np.float32)
    one_good = stored(1, (0.0, 1.0), (1.0, 0.0))
    all_fair = stored(2, (0.8, 0.6), (0.8, 0.6))
    assert by_best_sentence(question, [all_fair, one_good]) == [1, 2]


def test_passages_without_vectors_of_this_embedder_are_left_out_of_the_ranking_by_sentence() -> None:
    foreign = StoredPassage(Passage(3, "document", "Title", (), (Sentence("Text.", 0, 5),)), None)
    assert by_best_sentence(np.array([1.0, 0.0], np.float32), [foreign, stored(4, (1.0, 0.0))]) == [4]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What does fault E-217 on the RS-75 mean?", ["E-217", "RS-75"]),
        ("Is F07 serious?", ["F07"]),
        ("Who ruled in the 20th century, from 1620-21?", []),
        ("What does pump-2 report?", []),
        ("Is 4-20mA right?", []),
    ],
)
def test_codes_named_by_a_question_begin_with_letters(question: str, expected: list[str]) -> None:
    assert named_codes(question) == expected


def test_a_code_is_held_however_it_is_spelt() -> None:
    assert holds_codes(["E-217"], ["Fault E217: discharge temperature."])


def test_a_code_missing_from_its_own_series_is_not_held_though_the_machine_is() -> None:
    assert not holds_codes(["E-999", "RS-75"], ["RS-75: fault E-217 means a hot discharge."])


def test_a_tag_of_the_plant_that_no_text_uses_does_not_hide_the_fault_asked_for() -> None:
    assert holds_codes(["E-217", "P-101"], ["RS-75: fault E-217 means a hot discharge."])


def test_codes_none_of_which_stands_anywhere_are_not_held() -> None:
    assert not holds_codes(["X-1"], ["Fault E-217."])
