"""How much memory a model's worker will take, from its file's header, and whether there is room for it: pure.

Beside the resident memory of real workers on x86-64 with AVX2, MB estimated and measured: SmolLM2-135M with 2048 tokens
of context 207 and 220, with 8192 349 and 362; Gemma 3 270M 407 and 414, 521 and 531; MiniLM 144 and 135.
"""

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from edged.models.gguf import GgufHeader

KV_BYTES: Final = 2  # an entry of the KV cache is f16
FLOAT_BYTES: Final = 4

REPACKED_TYPES: Final = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})
"""Tensor types that llama.cpp copies into another order for the CPU's wide instructions (ggml-cpu/repack.cpp)."""

PROCESS_BYTES: Final = 45_000_000
"""A worker before it has a model: the interpreter, NumPy, llama.cpp (25 MB of its own, 20 MB shared libraries)."""

TOKEN_BYTES: Final = 160
"""What llama.cpp's tables keep per token of the vocabulary: its text twice, score, two maps."""

ACTIVATIONS: Final = 12
"""Rows of the embedding's width alive at once in a layer's graph."""

KEEP_FREE_SHARE: Final = 0.05
"""Of the memory free now, what is left for everybody else."""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes a worker needs, by what for. ``weights`` is the mapped file: other processes share its pages.

    ``repacked`` are private copies of weights; ``kv`` is the cache for all its tokens; ``prefixes`` are kept states of
    prompts; ``compute`` are buffers of one step; ``process`` is everything else.
    """

    weights: int
    repacked: int
    kv: int
    prefixes: int
    compute: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.repacked + self.kv + self.prefixes + self.compute + self.process


def need(
    header: GgufHeader, *, context_tokens: int, batch_tokens: int, sequences: int, prefix_cache_bytes: int = 0
) -> Need:
    """What a worker with these settings takes once it has filled its context and its caches."""
    return Need(
        weights=header.file_bytes,
        repacked=_repacked(header.tensor_bytes_by_type),
        kv=_kv(header, context_tokens),
        prefixes=prefix_cache_bytes,
        compute=_compute(header, batch_tokens, sequences),
        process=PROCESS_BYTES + TOKEN_BYTES * header.vocabulary_size,
    )


def _repacked(bytes_by_type: Mapping[str, int]) -> int:
    return sum(size for kind, size in bytes_by_type.items() if kind in REPACKED_TYPES)


def _kv(header: GgufHeader, context_tokens: int) -> int:
    """Keys and values of every layer; an encoder keeps none."""
    if not header.causal:
        return 0
    return sum(header.head_counts_kv) * (header.key_length + header.value_length) * KV_BYTES * context_tokens


def _compute(header: GgufHeader, batch_tokens: int, sequences: int) -> int:
    activations = batch_tokens * header.embedding_length * ACTIVATIONS * FLOAT_BYTES
    if header.causal:
        return activations + sequences * header.vocabulary_size * FLOAT_BYTES
    return activations + batch_tokens**2 * header.heads * FLOAT_BYTES  # attention of all tokens to all


Room = Literal["beside", "serial", "none"]


def room(need_bytes: int, *, available_bytes: int, held_by_active_bytes: int) -> Room:
    """Whether a candidate fits ``beside`` the active model, only after it has gone (``serial``), or not at all.

    ``available_bytes`` is what the system would give now, ``held_by_active_bytes`` what ending the active worker
    gives back.
    """
    if need_bytes <= available_bytes * (1 - KEEP_FREE_SHARE):
        return "beside"
    if need_bytes <= (available_bytes + held_by_active_bytes) * (1 - KEEP_FREE_SHARE):
        return "serial"
    return "none"
