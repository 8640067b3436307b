"""Copies a model with all its weights in eight bits, and tries both: a child process, run by :mod:`edged.models.wide`.

``python -m edged.engine.widen FILE COPY THREADS`` prints a :class:`~edged.types.Trial` as JSON.
"""

import ctypes
import signal
import sys
import time
from pathlib import Path
from typing import Final

import llama_cpp as C
import msgspec

from edged.engine.llama import Batch, LlamaError, Model, last_log, quiet
from edged.types import TokenSeconds, Trial

PROMPT_TOKENS: Final = 32
ANSWER_TOKENS: Final = 8
ROUNDS: Final = 5
ENOUGH_SECONDS: Final = 6.0  # no further round after these: an emulated processor takes minutes for one
EXIT_MODEL: Final = 3
PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def main() -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    file, copy, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    quiet()
    try:
        widen(file, copy, threads)
        print(msgspec.json.encode(compare(file, copy, threads)).decode())  # noqa: T201 - to the parent
    except LlamaError as error:
        print(error, file=sys.stderr)  # noqa: T201 - to the parent
        return EXIT_MODEL
    return 0


def widen(file: Path, copy: Path, threads: int) -> None:
    """Write ``copy``: the matrices of ``file`` as Q8_0, all else as it is."""
    params = C.llama_model_quantize_default_params()
    params.ftype = C.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    params.nthread = threads
    if C.llama_model_quantize(str(file).encode(), str(copy).encode(), ctypes.byref(params)) != 0:
        raise LlamaError(f"llama.cpp cannot make eight bits of {file}: {last_log()}")


def compare(file: Path, copy: Path, threads: int) -> Trial:
    """The quickest of some rounds for each, taken in turn."""
    runs = [_Run(file, threads), _Run(copy, threads)]
    try:
        for run in runs:
            run.decode(1)  # reads all weights
        began = time.monotonic()
        measured: list[list[TokenSeconds]] = []
        while not measured or (len(measured) < ROUNDS and time.monotonic() - began < ENOUGH_SECONDS):
            measured.append([run.measure() for run in runs])
    finally:
        for run in runs:
            run.close()
    best = [
        TokenSeconds(
            prompt=min(seconds.prompt for seconds in rounds),
            answer=min(seconds.answer for seconds in rounds),
        )
        for rounds in zip(*measured, strict=True)
    ]
    return Trial(file=best[0], copy=best[1])


class _Run:
    """A model of which some tokens are computed."""

    def __init__(self, path: Path, threads: int) -> None:
        self._model = Model(path)
        params = C.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 2 * (PROMPT_TOKENS + ANSWER_TOKENS)
        params.n_threads = params.n_threads_batch = threads
        self._context = C.llama_init_from_model(self._model.handle, params)
        if not self._context:
            raise LlamaError(f"llama.cpp cannot create a context for {path}: {last_log()}")
        self._batch = Batch(PROMPT_TOKENS)
        self._position = 0

    def measure(self) -> TokenSeconds:
        C.llama_memory_clear(C.llama_get_memory(self._context), True)
        self._position = 0
        began = time.perf_counter()
        self.decode(PROMPT_TOKENS)
        prompt = time.perf_counter()
        for _ in range(ANSWER_TOKENS):
            self.decode(1)
        ended = time.perf_counter()
        return TokenSeconds(
            prompt=(prompt - began) / PROMPT_TOKENS,
            answer=(ended - prompt) / ANSWER_TOKENS,
        )

    def decode(self, count: int) -> None:
        """Compute ``count`` tokens, whichever, in one step."""
        self._batch.clear()
        for index in range(count):
            token = 1 + (self._position * 7919) % (self._model.vocabulary_tokens - 1)
            self._batch.add(token, self._position, 0, output=index == count - 1)
            self._position += 1
        if C.llama_decode(self._context, self._batch.raw) != 0:
            raise LlamaError(f"llama_decode failed: {last_log()}")
        C.llama_synchronize(self._context)

    def close(self) -> None:
        self._batch.close()
        C.llama_free(self._context)
        self._model.close()


if __name__ == "__main__":
    sys.exit(main())
