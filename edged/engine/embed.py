"""Several texts a step: pack token lists into one batch, pool each sequence, normalise."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import llama_cpp as C
import numpy as np
import numpy.typing as npt

from edged.engine.llama import Batch, LlamaError, Model, float_view, last_log
from edged.workers.protocol import Cancel, Embed, Failed, Generate, Reply, Request, Tune, Vectors, WorkerSettings

LONGEST_TEXT_TOKENS = 512
SEQUENCES_PER_STEP = 32

FloatArray = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Texts:
    id: int
    tokens: list[list[int]]
    vectors: list[FloatArray] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.tokens) - len(self.vectors)


class EmbedEngine:
    """Owns one llama context with pooling. The shortest request goes first: a question never waits for a book."""

    gather_seconds = 0.0

    def __init__(self, model: Model, settings: WorkerSettings, send: Callable[[Reply], None]) -> None:
        self._model = model
        self._send = send
        self._queue_limit = settings.queue_limit
        self.threads = self._most_threads = settings.threads
        self.context_tokens = min(model.train_context_tokens or LONGEST_TEXT_TOKENS, LONGEST_TEXT_TOKENS)
        self._batch = Batch(max(settings.batch_tokens, self.context_tokens))
        self._context = _create_context(model, settings, self._batch.capacity)
        if C.llama_pooling_type(self._context) in (C.LLAMA_POOLING_TYPE_NONE, C.LLAMA_POOLING_TYPE_RANK):
            raise LlamaError("this model has no pooling of token vectors into one embedding")
        self._requests: list[_Texts] = []

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def handle(self, request: Request, _now: float) -> None:
        """Take a request in; a refusal is sent as :class:`Failed`."""
        match request:
            case Embed():
                self._submit(request)
            case Cancel():
                self._requests = [texts for texts in self._requests if texts.id != request.id]
            case Generate():
                self._send(Failed(request.id, "worker_error", "this worker holds an embedding model"))
            case Tune(threads=threads):
                self.threads = max(1, min(threads, self._most_threads))
                C.llama_set_n_threads(self._context, self.threads, self.threads)

    def step(self, _now: Callable[[], float]) -> None:
        """Embed as many texts as fit one batch and send the requests that are complete."""
        self._requests.sort(key=lambda texts: texts.left)
        owners: list[_Texts] = []
        self._batch.clear()
        for texts in self._requests:
            for tokens in texts.tokens[len(texts.vectors) :]:
                if not self._room(len(tokens), len(owners)):
                    break
                self._add(tokens, sequence=len(owners))
                owners.append(texts)
        self._compute(owners)
        for texts in [texts for texts in self._requests if not texts.left]:
            self._requests.remove(texts)
            counted = sum(map(len, texts.tokens))
            self._send(Vectors(texts.id, self._model.dimensions, _pack(texts.vectors), counted))

    def close(self) -> None:
        self._batch.close()
        C.llama_free(self._context)

    def _submit(self, request: Embed) -> None:
        if len(self._requests) >= self._queue_limit:
            self._send(Failed(request.id, "queue_full", f"{self._queue_limit} requests are waiting already"))
            return
        if not request.texts:
            self._send(Vectors(request.id, self._model.dimensions, b""))
            return
        self._requests.append(_Texts(request.id, [self._tokenize(text) for text in request.texts]))

    def _tokenize(self, text: str) -> list[int]:
        tokens = self._model.tokenize(text, add_special=True, parse_special=False)
        if len(tokens) > self.context_tokens:
            tokens = [*tokens[: self.context_tokens - 1], tokens[-1]]  # the end mark stays
        return tokens

    def _room(self, tokens: int, sequences: int) -> bool:
        used = int(self._batch.raw.n_tokens)
        return used + tokens <= self._batch.capacity and sequences < SEQUENCES_PER_STEP

    def _add(self, tokens: Sequence[int], sequence: int) -> None:
        for position, token in enumerate(tokens):
            self._batch.add(token, position, sequence, output=True)

    def _compute(self, owners: list[_Texts]) -> None:
        memory = C.llama_get_memory(self._context)
        if memory:  # decoder models used as embedders keep a KV cache
            C.llama_memory_clear(memory, False)
        code = C.llama_decode(self._context, self._batch.raw)
        if code != 0:
            raise LlamaError(f"llama_decode returned {code}: {last_log()}")
        for sequence, texts in enumerate(owners):
            pointer = C.llama_get_embeddings_seq(self._context, sequence)
            vector = float_view(pointer, self._model.dimensions).copy()
            texts.vectors.append(vector / max(float(np.linalg.norm(vector)), 1e-12))


def _pack(vectors: list[FloatArray]) -> bytes:
    return np.stack(vectors).astype("<f4").tobytes()


def _create_context(model: Model, settings: WorkerSettings, batch_tokens: int) -> ctypes.c_void_p:
    params = C.llama_context_default_params()
    params.n_ctx = batch_tokens
    params.n_batch = batch_tokens
    params.n_ubatch = batch_tokens
    params.n_seq_max = SEQUENCES_PER_STEP
    params.n_threads = settings.threads
    params.n_threads_batch = settings.threads
    params.kv_unified = True
    params.embeddings = True
    params.no_perf = True
    context: ctypes.c_void_p = C.llama_init_from_model(model.handle, params)
    if not context:
        raise LlamaError(f"llama.cpp cannot create an embedding context: {last_log()}")
    return context
