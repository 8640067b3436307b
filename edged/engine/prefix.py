"""What of a prompt has been computed before: states of token sequences, the least recently used dropped first; pure."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edged.engine.scheduler import cut

SHORTEST_REUSE_TOKENS = 16

TokenArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The KV state after ``tokens``, as llama.cpp saved it. The first ``prompt_tokens`` were computed as a prompt."""

    tokens: TokenArray
    data: bytes
    prompt_tokens: int

    @property
    def size_bytes(self) -> int:
        return len(self.data) + self.tokens.nbytes


def key_of(tokens: TokenArray) -> bytes:
    """A name for a token sequence, equal for equal sequences."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def token_array(tokens: Sequence[int]) -> TokenArray:
    return np.asarray(tokens, np.int32)


def common(one: TokenArray, other: TokenArray) -> int:
    """Length of the longest common prefix."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def usable(state: State, tokens: TokenArray, prefix_tokens: int) -> int:
    """How many leading tokens of a prompt a state can stand for; at least one token is left to compute.

    Within what was computed as a prompt it ends where a prompt is cut into pieces, so that the rest is computed in the
    same pieces as without reuse, and comes out the same bit for bit.
    """
    shared = min(common(state.tokens, tokens), len(tokens) - 1)
    if shared <= state.prompt_tokens:
        shared = cut(shared, prefix_tokens)
    return shared if shared >= SHORTEST_REUSE_TOKENS else 0


class PrefixCache:
    """States by the tokens they stand for, ``limit_bytes`` together; 0 keeps none."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._states: OrderedDict[bytes, State] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    @property
    def enabled(self) -> bool:
        return self._limit_bytes > 0

    def holds(self, tokens: TokenArray) -> bool:
        """Whether exactly this sequence is kept; it counts as used."""
        key = key_of(tokens)
        if key not in self._states:
            return False
        self._states.move_to_end(key)
        return True

    def put(self, state: State) -> None:
        """Keep a state, dropping those unused for longest; one larger than the limit is not kept."""
        self._drop(key_of(state.tokens))
        if state.size_bytes > self._limit_bytes:
            return
        self._states[key_of(state.tokens)] = state
        self.bytes += state.size_bytes
        self._shrink()

    def best(self, tokens: TokenArray, prefix_tokens: int) -> tuple[int, State | None]:
        """The state that stands for most of a prompt, and for how many tokens; it counts as used."""
        length, key = max(
            ((usable(state, tokens, prefix_tokens), key) for key, state in self._states.items()), default=(0, b"")
        )
        if not length:
            return 0, None
        self._states.move_to_end(key)
        return length, self._states[key]

    def forget(self, state: State) -> None:
        """Drop a state that turned out to be of no use."""
        self._drop(key_of(state.tokens))

    def limit(self, limit_bytes: int) -> None:
        """Another limit; what is over it is dropped at once."""
        self._limit_bytes = limit_bytes
        self._shrink()

    def _shrink(self) -> None:
        while self.bytes > self._limit_bytes:
            self._drop(next(iter(self._states)))

    def _drop(self, key: bytes) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self.bytes -= state.size_bytes
