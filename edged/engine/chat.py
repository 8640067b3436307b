"""Continuous batching: all running generations advance together, one llama_decode a step."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import llama_cpp as C

from edged.engine.llama import Batch, LlamaError, Model, last_log
from edged.engine.scheduler import Job, RefusedError, Scheduler, Work
from edged.engine.text import TextStream
from edged.types import Sampling
from edged.workers.protocol import Cancel, Embed, Failed, Finished, Generate, Piece, Reply, WorkerSettings

PENALTY_WINDOW_TOKENS = 64


@dataclass(slots=True)
class _Generation:
    job: Job
    tokens: list[int]
    text: TextStream
    sampler: ctypes.c_void_p


class ChatEngine:
    """Owns one llama context. ``send`` is called with every reply, in order, on the caller's thread."""

    def __init__(self, model: Model, settings: WorkerSettings, send: Callable[[Reply], None]) -> None:
        self._model = model
        self._send = send
        self.context_tokens = settings.context_tokens
        batch_tokens = max(settings.batch_tokens, settings.sequences)
        self._context = _create_context(model, settings, batch_tokens)
        self._memory = C.llama_get_memory(self._context)
        self._batch = Batch(batch_tokens)
        # A sequence longer than the model was trained for degrades silently, so it is not offered.
        self._longest_tokens = min(settings.context_tokens, model.train_context_tokens or settings.context_tokens)
        self._scheduler = Scheduler(
            sequences=settings.sequences,
            context_tokens=settings.context_tokens,
            batch_tokens=batch_tokens,
            queue_limit=settings.queue_limit,
        )
        self._generations: dict[int, _Generation] = {}

    @property
    def busy(self) -> bool:
        return self._scheduler.busy

    def handle(self, request: Generate | Embed | Cancel, now: float) -> None:
        """Take a request in; a refusal is sent as :class:`Failed`."""
        match request:
            case Generate():
                self._submit(request, now)
            case Cancel():
                self._end(request.id)
            case Embed():
                self._send(Failed(request.id, "worker_error", "this worker holds a chat model and does not embed"))

    def step(self, now: Callable[[], float]) -> None:
        """Compute one decode step and send what came of it."""
        for job in self._scheduler.overdue(now()):
            self._end(job.id)
            self._send(Failed(job.id, "deadline_exceeded", f"stopped after {job.produced} tokens"))
        plan = self._scheduler.plan(now())
        if not plan:
            return
        outputs = self._fill(plan)
        code = C.llama_decode(self._context, self._batch.raw)
        if code != 0:
            raise LlamaError(f"llama_decode returned {code}: {last_log()}")
        moment = now()
        for work in plan:
            self._scheduler.advance(work, moment)
            if work.output:
                self._sample(work.job, outputs[work.job.id], now)

    def close(self) -> None:
        for request_id in list(self._generations):
            self._end(request_id)
        self._batch.close()
        C.llama_free(self._context)

    def _submit(self, request: Generate, now: float) -> None:
        tokens = self._model.tokenize_prompt(request.prompt)
        deadline = None if request.deadline_seconds is None else now + request.deadline_seconds
        if not tokens or len(tokens) >= self._longest_tokens:
            reason = f"the prompt has {len(tokens)} tokens; this model takes 1 to {self._longest_tokens - 1}"
            self._send(Failed(request.id, "prompt_too_long" if tokens else "worker_error", reason))
            return
        max_tokens = min(request.max_tokens, self._longest_tokens - len(tokens))
        job = Job(request.id, len(tokens), max_tokens, submitted=now, deadline=deadline)
        try:
            self._scheduler.submit(job)
        except RefusedError as refusal:
            self._send(Failed(request.id, refusal.code, str(refusal)))
            return
        self._generations[job.id] = _Generation(
            job, tokens, TextStream(request.stop), _create_sampler(request.sampling)
        )

    def _fill(self, plan: list[Work]) -> dict[int, int]:
        """Put a plan into the batch; returns the batch index of each output by job id."""
        self._batch.clear()
        outputs = {}
        for work in plan:
            job, tokens = work.job, self._generations[work.job.id].tokens
            start = job.prefilled if job.produced == 0 else len(tokens) - 1
            last = start + work.tokens - 1
            for position in range(start, last + 1):
                index = self._batch.add(
                    tokens[position], position, job.sequence, output=work.output and position == last
                )
            outputs[job.id] = index
        return outputs

    def _sample(self, job: Job, index: int, now: Callable[[], float]) -> None:
        generation = self._generations[job.id]
        token = C.llama_sampler_sample(generation.sampler, self._context, index)
        if self._model.ends_generation(token):
            self._finish(generation, "stop", now())
            return
        generation.tokens.append(token)
        text = generation.text.feed(self._model.token_bytes(token))
        if text:
            self._send(Piece(job.id, text))
        if generation.text.stopped:
            self._finish(generation, "stop", now())
        elif job.produced >= job.max_tokens:
            self._finish(generation, "length", now())

    def _finish(self, generation: _Generation, reason: str, now: float) -> None:
        job = generation.job
        rest = generation.text.flush()
        if rest:
            self._send(Piece(job.id, rest))
        self._end(job.id)
        self._send(
            Finished(
                id=job.id,
                reason="length" if reason == "length" else "stop",
                prompt_tokens=job.prompt_tokens,
                completion_tokens=job.produced,
                queue_ms=(job.admitted - job.submitted) * 1e3,
                prefill_ms=(job.first_token - job.admitted) * 1e3,
                generate_ms=(now - job.first_token) * 1e3,
            )
        )

    def _end(self, request_id: int) -> None:
        """Give back everything a request holds: sequence, KV cells, sampler."""
        job = self._scheduler.end(request_id)
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            C.llama_sampler_free(generation.sampler)
        if job is not None and job.sequence >= 0 and not C.llama_memory_seq_rm(self._memory, job.sequence, -1, -1):
            raise LlamaError(f"llama.cpp did not release sequence {job.sequence}")


def _create_context(model: Model, settings: WorkerSettings, batch_tokens: int) -> ctypes.c_void_p:
    params = C.llama_context_default_params()
    params.n_ctx = settings.context_tokens
    params.n_batch = batch_tokens
    params.n_ubatch = batch_tokens
    params.n_seq_max = settings.sequences
    params.n_threads = settings.threads
    params.n_threads_batch = settings.threads
    params.kv_unified = True
    params.no_perf = True
    context: ctypes.c_void_p = C.llama_init_from_model(model.handle, params)
    if not context:
        raise LlamaError(f"llama.cpp cannot create a context of {settings.context_tokens} tokens: {last_log()}")
    return context


def _create_sampler(sampling: Sampling) -> ctypes.c_void_p:
    chain: ctypes.c_void_p = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
    if sampling.repeat_penalty != 1.0:
        C.llama_sampler_chain_add(
            chain, C.llama_sampler_init_penalties(PENALTY_WINDOW_TOKENS, sampling.repeat_penalty, 0.0, 0.0)
        )
    if sampling.temperature <= 0:
        C.llama_sampler_chain_add(chain, C.llama_sampler_init_greedy())
        return chain
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_k(sampling.top_k))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_top_p(sampling.top_p, 1))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_min_p(sampling.min_p, 1))
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_temp(sampling.temperature))
    seed = C.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed
    C.llama_sampler_chain_add(chain, C.llama_sampler_init_dist(seed))
    return chain
