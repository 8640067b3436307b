"""The thin layer over llama.cpp's C API: load a model, tokenise, fill a batch. Knows nothing of requests."""

import ctypes
from collections.abc import Iterable
from pathlib import Path

import llama_cpp as C

from edged.types import Segment


class LlamaError(RuntimeError):
    """llama.cpp refused or failed; the message holds the last lines it logged."""


_recent_log: list[str] = []


def _keep_log(_level: int, text: bytes, _data: object) -> None:
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


class Model:
    """A loaded GGUF file and its vocabulary."""

    def __init__(self, path: Path) -> None:
        params = C.llama_model_default_params()
        self.handle = C.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise LlamaError(f"llama.cpp cannot load {path}: {last_log()}")
        self.vocabulary = C.llama_model_get_vocab(self.handle)

    @property
    def description(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        C.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def train_context_tokens(self) -> int:
        return int(C.llama_model_n_ctx_train(self.handle))

    @property
    def dimensions(self) -> int:
        return int(C.llama_model_n_embd(self.handle))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:
            tokens = (C.llama_token * size)()
            count = C.llama_tokenize(self.vocabulary, data, len(data), tokens, size, add_special, parse_special)
            if count >= 0:
                return list(tokens[:count])
            size = -count

    def tokenize_prompt(self, segments: Iterable[Segment]) -> list[int]:
        """Tokens of a prompt; only ``special`` segments may become special tokens."""
        tokens: list[int] = []
        for number, segment in enumerate(segments):
            tokens += self.tokenize(segment.text, add_special=number == 0, parse_special=segment.special)
        return tokens

    def token_bytes(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = C.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def ends_generation(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self.vocabulary, token))

    def close(self) -> None:
        if self.handle:
            C.llama_model_free(self.handle)
            self.handle = None


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
