"""Exact nearest-neighbour search over one matrix in memory.

Up to some tens of thousands of passages it is as fast as a graph index on the same device, and never misses.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COSINE_DIGITS = 6

FloatArray = NDArray[np.float32]

_REMOVED = -1
_SMALLEST_CAPACITY = 64


class _State(NamedTuple):
    """What a search works on. Nothing below ``used`` ever changes in place: changes make a new state.

    ``matrix``: (capacity, dimensions); ``ids``: (capacity,), ``_REMOVED`` where a vector is gone;
    ``used``: rows filled, ``gone``: how many of them are removed.
    """

    matrix: FloatArray
    ids: NDArray[np.int64]
    used: int
    gone: int


class VectorIndex:
    """Ids and their unit vectors, searched by dot product.

    One owner changes it, one change at a time; any thread may search meanwhile and sees the state before or after
    a change, never a mixture.
    """

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._changing = threading.Lock()
        self._state = _empty(dimensions)

    def __len__(self) -> int:
        state = self._state
        return state.used - state.gone

    def add(self, ids: Sequence[int], vectors: FloatArray) -> None:
        """Add ``vectors``, (len(ids), dimensions), normalised. Ids are not negative and not in the index yet."""
        self.replace((), ids, vectors)

    def remove(self, ids: Sequence[int]) -> None:
        """Drop ``ids``; unknown ones are no error. When much is gone, its memory is returned."""
        self.replace(ids, (), np.empty((0, self.dimensions), np.float32))

    def replace(self, gone: Sequence[int], ids: Sequence[int], vectors: FloatArray) -> None:
        """Drop ``gone`` and add ``ids`` in one step: a search sees all of it or nothing."""
        if vectors.shape != (len(ids), self.dimensions):
            raise ValueError(f"{len(ids)} ids of {self.dimensions} dimensions, but vectors have {vectors.shape}")
        with self._changing:
            self._state = _with(_without(self._state, gone), np.asarray(ids, np.int64), vectors)

    def search(self, vector: FloatArray, limit: int) -> list[tuple[int, float]]:
        """The ``limit`` ids nearest to ``vector``, (dimensions,), with their dot product; best first, ties by id."""
        state = self._state  # one reference, read once: the whole search sees this state
        if limit < 1 or state.used == state.gone:
            return []
        # Rounded, because BLAS sums equal rows in different orders: equal vectors shall be equally near.
        distances = np.round(-(state.matrix[: state.used] @ vector), COSINE_DIGITS)
        ids = state.ids[: state.used]
        if state.gone:
            live = ids != _REMOVED
            distances, ids = distances[live], ids[live]
        near = _smallest(distances, limit)
        order = near[np.lexsort((ids[near], distances[near]))][:limit]
        return [(int(ids[row]), -float(distances[row])) for row in order]


def _smallest(distances: FloatArray, limit: int) -> NDArray[np.intp]:
    """Rows of the ``limit`` smallest values and of all that equal the last of them."""
    if limit >= len(distances):
        return np.arange(len(distances))
    bound = np.partition(distances, limit - 1)[limit - 1]
    return np.flatnonzero(distances <= bound)


def _empty(dimensions: int, capacity: int = 0) -> _State:
    return _State(np.empty((capacity, dimensions), np.float32), np.empty(capacity, np.int64), 0, 0)


def _without(state: _State, gone: Sequence[int]) -> _State:
    """``state`` with the rows of ``gone`` marked; with more marked than live ones, without those rows."""
    if not len(gone):
        return state
    ids = state.ids.copy()  # searches under way keep the ids they began with
    ids[: state.used][np.isin(ids[: state.used], np.asarray(gone, np.int64))] = _REMOVED
    live = np.flatnonzero(ids[: state.used] != _REMOVED)
    marked = state._replace(ids=ids, gone=state.used - len(live))
    if marked.gone <= len(live):
        return marked
    return _State(state.matrix[live], ids[live], len(live), 0)


def _with(state: _State, ids: NDArray[np.int64], vectors: FloatArray) -> _State:
    """``state`` with rows added behind its own, where no search that began earlier looks."""
    if not len(ids):
        return state
    if np.isin(ids, state.ids[: state.used]).any() or len(np.unique(ids)) != len(ids):
        raise ValueError("an id is in the index already")
    used = state.used + len(ids)
    if used > len(state.ids):
        state = _grown(state, used)
    state.ids[state.used : used] = ids
    state.matrix[state.used : used] = vectors
    return state._replace(used=used)


def _grown(state: _State, needed: int) -> _State:
    capacity = max(needed, len(state.ids) * 3 // 2, _SMALLEST_CAPACITY)
    grown = _empty(state.matrix.shape[1], capacity)
    grown.ids[: state.used] = state.ids[: state.used]
    grown.matrix[: state.used] = state.matrix[: state.used]
    return grown._replace(used=state.used, gone=state.gone)
