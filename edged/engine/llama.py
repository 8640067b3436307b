"""The thin layer over llama.cpp's C API: load a model, tokenise, fill a batch. Knows nothing of requests."""

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path

import llama_cpp as C
import numpy as np
import numpy.typing as npt

from edged.types import Segment
from edged.workers.protocol import LoadMode


class LlamaError(RuntimeError):
    """llama.cpp refused or failed; the message holds the last lines it logged."""


WARNING_LEVEL = 3  # ggml_log_level
_recent_log: list[str] = []


def _keep_log(level: int, text: bytes, _data: object) -> None:
    if level < WARNING_LEVEL:
        return
    _recent_log.append(text.decode("utf-8", "replace").strip())
    del _recent_log[:-20]


# A module attribute, because a callback that is garbage-collected crashes at the next line logged.
_log_callback = C.llama_log_callback(_keep_log)


def quiet() -> None:
    """Keep llama.cpp's log lines for error messages instead of printing them."""
    C.llama_log_set(_log_callback, ctypes.c_void_p(0))
    C.llama_backend_init()


def last_log() -> str:
    return " | ".join(line for line in _recent_log[-4:] if line and line != ".")


LOAD_MODES: dict[LoadMode, int] = {
    "mmap": C.LLAMA_LOAD_MODE_AUTO,  # copied all the same for a GPU that cannot use mapped memory
    "mlock": C.LLAMA_LOAD_MODE_MMAP_MLOCK,
    "read": C.LLAMA_LOAD_MODE_NONE,
}


class Model:
    """A loaded GGUF file and its vocabulary.

    ``gpu_layers`` of it (-1: all) are on the GPU; without one, all are computed on the CPU.
    """

    def __init__(self, path: Path, *, load_mode: LoadMode = "mmap", gpu_layers: int = 0) -> None:
        params = C.llama_model_default_params()
        params.load_mode = LOAD_MODES[load_mode]
        params.n_gpu_layers = gpu_layers
        self.handle = C.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise LlamaError(f"llama.cpp cannot load {path}: {last_log()}")
        self.vocabulary = C.llama_model_get_vocab(self.handle)
        self.vocabulary_tokens = int(C.llama_vocab_n_tokens(self.vocabulary))
        self._bytes_of_token: dict[int, bytes] = {}
        self._tokens = (C.llama_token * 256)()

    @property
    def description(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        C.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def weight_bytes(self) -> int:
        """Size of the weights."""
        return int(C.llama_model_size(self.handle))

    @property
    def train_context_tokens(self) -> int:
        return int(C.llama_model_n_ctx_train(self.handle))

    @property
    def dimensions(self) -> int:
        return int(C.llama_model_n_embd(self.handle))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        while True:
            room = len(self._tokens)
            count = C.llama_tokenize(self.vocabulary, data, len(data), self._tokens, room, add_special, parse_special)
            if count >= 0:
                return list(self._tokens[:count])
            # Kept for the next text: each length of array is a type of its own, which only the collector frees.
            self._tokens = (C.llama_token * (2 * -count))()

    def tokenize_prompt(self, segments: Iterable[Segment], *, start: bool = True) -> list[int]:
        """Tokens of a prompt, or, without ``start``, of its continuation.

        Only ``special`` segments may become special tokens.
        """
        tokens: list[int] = []
        for number, segment in enumerate(segments):
            first = start and number == 0
            tokens += self.tokenize(segment.text, add_special=first, parse_special=segment.special)
        return tokens

    @property
    def keeps_whole_states(self) -> bool:
        """Whether the state of any part of a sequence is there to be used again.

        Recurrent models have only the latest state, and those with a sliding window drop what is behind it.
        """
        recurrent = C.llama_model_is_recurrent(self.handle) or C.llama_model_is_hybrid(self.handle)
        return not recurrent and C.llama_model_n_swa(self.handle) == 0

    def token_bytes(self, token: int) -> bytes:
        """The text of a token; empty for control tokens."""
        known = self._bytes_of_token.get(token)
        if known is None:
            known = self._bytes_of_token[token] = self._read_token_bytes(token)
        return known

    def _read_token_bytes(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = C.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def ends_generation(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self.vocabulary, token))

    @functools.cached_property
    def end_tokens(self) -> list[int]:
        """The tokens that end a generation."""
        return [token for token in range(self.vocabulary_tokens) if self.ends_generation(token)]

    def close(self) -> None:
        if self.handle:
            C.llama_model_free(self.handle)
            self.handle = None


def float_view(pointer: "ctypes._Pointer[ctypes.c_float]", count: int) -> npt.NDArray[np.float32]:
    """llama.cpp's own memory, valid until it computes again."""
    # Not as_array(pointer, shape): its cast makes a cycle, which only the collector frees.
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(ctypes.addressof(pointer.contents)))


class Batch:
    """A reusable llama_batch: each token belongs to one sequence."""

    def __init__(self, capacity: int) -> None:
        self.raw = C.llama_batch_init(capacity, 0, 1)
        self.capacity = capacity

    def clear(self) -> None:
        self.raw.n_tokens = 0

    def add(self, token: int, position: int, sequence: int, *, output: bool) -> int:
        """Append a token; returns its index in the batch."""
        raw = self.raw
        index = int(raw.n_tokens)
        raw.token[index] = token
        raw.pos[index] = position
        raw.n_seq_id[index] = 1
        raw.seq_id[index][0] = sequence
        raw.logits[index] = output
        raw.n_tokens = index + 1
        return index

    def close(self) -> None:
        if self.raw is not None:
            C.llama_batch_free(self.raw)
            self.raw = None
