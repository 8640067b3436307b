"""The vector index equals a brute-force search, whatever was added and removed, also while it changes."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edged.store.vectors import FloatArray, VectorIndex

DIMENSIONS = 8


def unit_vectors(count: int, seed: int = 0) -> FloatArray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSIONS)).astype(np.float32)
    normalised: FloatArray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised


def test_an_empty_index_finds_nothing() -> None:
    assert VectorIndex(DIMENSIONS).search(unit_vectors(1)[0], 5) == []


def test_the_nearest_come_first_with_their_cosines() -> None:
    index = VectorIndex(DIMENSIONS)
    vectors = unit_vectors(50)
    index.add(range(100, 150), vectors)
    found = index.search(vectors[7], 5)
    cosines = vectors @ vectors[7]
    assert [chunk_id for chunk_id, _ in found] == [100 + int(row) for row in np.argsort(-cosines)[:5]]
    assert [score for _, score in found] == pytest.approx(sorted(cosines, reverse=True)[:5], abs=1e-6)


def test_equal_vectors_are_ordered_by_id_also_at_the_limit() -> None:
    index = VectorIndex(DIMENSIONS)
    vector = unit_vectors(1)
    index.add([9, 3, 7, 1, 5], np.repeat(vector, 5, axis=0))
    assert [chunk_id for chunk_id, _ in index.search(vector[0], 3)] == [1, 3, 5]


@pytest.mark.parametrize("limit", [0, -1])
def test_nothing_is_found_where_nothing_is_asked_for(limit: int) -> None:
    index = VectorIndex(DIMENSIONS)
    index.add([1], unit_vectors(1))
    assert index.search(unit_vectors(1)[0], limit) == []


def test_a_limit_beyond_the_size_gives_all() -> None:
    index = VectorIndex(DIMENSIONS)
    index.add([1, 2, 3], unit_vectors(3))
    assert len(index.search(unit_vectors(1)[0], 10)) == 3


def test_removed_ids_are_not_found_and_unknown_ones_are_no_error() -> None:
    index = VectorIndex(DIMENSIONS)
    vectors = unit_vectors(10)
    index.add(range(10), vectors)
    index.remove([4, 77])
    assert len(index) == 9
    assert 4 not in dict(index.search(vectors[4], 10))


def test_an_id_cannot_be_added_twice_and_the_failure_changes_nothing() -> None:
    index = VectorIndex(DIMENSIONS)
    index.add([1, 2], unit_vectors(2))
    with pytest.raises(ValueError, match="already"):
        index.replace([1], [3, 2], unit_vectors(2))
    assert sorted(dict(index.search(unit_vectors(1)[0], 9))) == [1, 2]


def test_vectors_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="dimensions"):
        VectorIndex(DIMENSIONS).add([1], np.zeros((1, DIMENSIONS + 1), np.float32))


def test_memory_of_removed_vectors_is_returned() -> None:
    index = VectorIndex(DIMENSIONS)
    index.add(range(10_000), unit_vectors(10_000))
    index.remove(range(9_990))
    assert index._state.matrix.nbytes < 100 * DIMENSIONS * 4
    index.remove(range(10_000))
    assert index._state.matrix.nbytes == 0


def test_a_search_during_changes_sees_every_document_whole_and_exactly_once() -> None:
    """One thread replaces a document of three vectors again and again; a search finds exactly one version."""
    index = VectorIndex(DIMENSIONS)
    vectors = unit_vectors(3)
    index.add([0, 1, 2], vectors)
    stop = threading.Event()

    def replace_until_stopped() -> None:
        first = 3
        while not stop.is_set():
            index.replace(range(first - 3, first), range(first, first + 3), vectors)
            first += 3

    writer = threading.Thread(target=replace_until_stopped)
    writer.start()
    try:
        for _ in range(2_000):
            found = sorted(chunk_id for chunk_id, _ in index.search(vectors[0], 10))
            assert len(found) == 3
            assert found[0] % 3 == 0
            assert found == list(range(found[0], found[0] + 3))
    finally:
        stop.set()
        writer.join()


class AgainstBruteForce(RuleBasedStateMachine):
    """Any sequence of changes leaves an index that searches as a plain dictionary would."""

    def __init__(self) -> None:
        super().__init__()
        self.index = VectorIndex(DIMENSIONS)
        self.expected: dict[int, FloatArray] = {}
        self.next_id = 0

    @rule(count=st.integers(0, 40), gone=st.sets(st.integers(0, 200)), seed=st.integers(0, 1000))
    def replace(self, count: int, gone: set[int], seed: int) -> None:
        ids = range(self.next_id, self.next_id + count)
        vectors = unit_vectors(count, seed)
        self.index.replace(sorted(gone), ids, vectors)
        self.expected = {chunk_id: vector for chunk_id, vector in self.expected.items() if chunk_id not in gone}
        self.expected.update(zip(ids, vectors, strict=True))
        self.next_id += count

    @rule(share=st.floats(0, 1))
    def remove_oldest(self, share: float) -> None:
        gone = sorted(self.expected)[: int(len(self.expected) * share)]
        self.index.remove(gone)
        for chunk_id in gone:
            del self.expected[chunk_id]

    @invariant()
    def searches_alike(self) -> None:
        question = unit_vectors(1, seed=7)[0]
        best = sorted((-float(vector @ question), chunk_id) for chunk_id, vector in self.expected.items())[:5]
        found = self.index.search(question, 5)
        assert len(self.index) == len(self.expected)
        assert [score for _, score in found] == pytest.approx([-distance for distance, _ in best], abs=1e-5)
        for chunk_id, score in found:
            assert score == pytest.approx(float(self.expected[chunk_id] @ question), abs=1e-5)


TestAgainstBruteForce = AgainstBruteForce.TestCase
TestAgainstBruteForce.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


@given(rows=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30), limit=st.integers(1, 40))
def test_ties_never_push_out_something_nearer(rows: list[float], limit: int) -> None:
    index = VectorIndex(1)
    index.add(range(len(rows)), np.array(rows, np.float32).reshape(-1, 1))
    expected = sorted(enumerate(rows), key=lambda item: (-item[1], item[0]))[:limit]
    assert index.search(np.ones(1, np.float32), limit) == expected
