"""Continuous batching: all running generations advance together, one llama_decode a step."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llama_cpp as C

from edged.engine.llama import Batch, LlamaError, Model, last_log
from edged.engine.prefix import (
    SHORTEST_REUSE_TOKENS,
    PrefixCache,
    State,
    TokenArray,
    common,
    key_of,
    token_array,
)
from edged.engine.sampler import FormatError, Sampler, create_sampler
from edged.engine.scheduler import Job, Phase, RefusedError, Scheduler, Work
from edged.engine.snapshots import Snapshots
from edged.engine.text import TextStream
from edged.workers.protocol import (
    Cancel,
    Embed,
    Failed,
    Finished,
    Generate,
    Piece,
    Reply,
    Request,
    Tune,
    WorkerSettings,
)

CLOSING_TOKENS = 48
GATHER_SECONDS = 0.004
"""How long a first request waits for others that were sent with it: computed together they all cost less. Only where
others came the last time."""


@dataclass(slots=True)
class _Generation:
    job: Job
    tokens: list[int]
    text: TextStream
    sampler: Sampler
    keep: bool
    closing_tokens: int

    @property
    def prompt(self) -> TokenArray:
        return token_array(self.tokens[: self.job.prompt_tokens])

    @property
    def closing(self) -> bool:
        return self.job.max_tokens - self.job.produced < self.closing_tokens


class ChatEngine:
    """Owns one llama context. ``send`` is called with every reply, in order, on the caller's thread."""

    gather_seconds = GATHER_SECONDS

    def __init__(self, model: Model, settings: WorkerSettings, send: Callable[[Reply], None]) -> None:
        self._model = model
        self._send = send
        self._settings = settings
        self.threads = settings.threads
        batch_tokens = max(settings.batch_tokens, settings.sequences)
        self._context = _create_context(model, settings, batch_tokens)
        self._memory = C.llama_get_memory(self._context)
        self._batch = Batch(batch_tokens)
        self.context_tokens = C.llama_n_ctx_seq(self._context) if settings.kv_apart else settings.context_tokens
        # A sequence longer than the model was trained for degrades silently, so it is not offered.
        self._longest_tokens = min(self.context_tokens, model.train_context_tokens or self.context_tokens)
        self._scheduler = Scheduler(
            sequences=settings.sequences,
            context_tokens=self.context_tokens * (settings.sequences if settings.kv_apart else 1),
            batch_tokens=batch_tokens,
            queue_limit=settings.queue_limit,
        )
        self._generations: dict[int, _Generation] = {}
        reuses = model.keeps_whole_states and C.llama_memory_can_shift(self._memory)
        self._prefixes = PrefixCache(settings.prefix_cache_bytes if reuses else 0)
        self._snapshots = _snapshots(settings, model.description) if self._prefixes.enabled else None
        for state in self._snapshots.load() if self._snapshots else ():
            self._prefixes.put(state)

    @property
    def busy(self) -> bool:
        return self._scheduler.busy

    def handle(self, request: Request, now: float) -> None:
        """Take a request in; a refusal is sent as :class:`Failed`."""
        match request:
            case Generate():
                self._submit(request, now)
            case Cancel():
                self._end(request.id)
            case Embed():
                self._send(Failed(request.id, "worker_error", "this worker holds a chat model and does not embed"))
            case Tune():
                self._tune(request)

    def step(self, now: Callable[[], float]) -> None:
        """Compute one decode step and send what came of it."""
        started = now()
        for job in self._scheduler.overdue(started):
            self._end(job.id)
            self._send(Failed(job.id, "deadline_exceeded", f"stopped after {job.produced} tokens"))
        for job in self._scheduler.admit(started):
            self._scheduler.begin(job, self._reuse(job))
        plan = self._scheduler.plan(started)
        if not plan:
            return
        outputs = self._fill(plan)
        code = C.llama_decode(self._context, self._batch.raw)
        if code != 0:
            raise LlamaError(f"llama_decode returned {code}: {last_log()}")
        moment = now()
        self._scheduler.learn(plan, moment - started)
        for work in plan:
            self._scheduler.advance(work, moment)
            self._remember_prefix(work.job)
            if work.output:
                self._sample(work.job, outputs[work.job.id], now)

    def close(self) -> None:
        for request_id in list(self._generations):
            self._end(request_id)
        self._batch.close()
        C.llama_free(self._context)

    # --- requests --------------------------------------------------------------------------------------

    def _submit(self, request: Generate, now: float) -> None:
        prefix = self._model.tokenize_prompt(request.prompt[: request.prefix_segments])
        tokens = prefix + self._model.tokenize_prompt(request.prompt[request.prefix_segments :], start=not prefix)
        if not tokens or len(tokens) >= self._longest_tokens:
            reason = f"the prompt has {len(tokens)} tokens; this model takes 1 to {self._longest_tokens - 1}"
            self._send(Failed(request.id, "prompt_too_long" if tokens else "worker_error", reason))
            return
        # Cut there also where nothing is kept: whether states are kept must not change what is computed.
        stable = SHORTEST_REUSE_TOKENS <= len(prefix) < len(tokens)
        job = Job(
            request.id,
            len(tokens),
            min(request.max_tokens, self._longest_tokens - len(tokens)),
            submitted=now,
            priority=request.priority,
            deadline=None if request.deadline_seconds is None else now + request.deadline_seconds,
            prefix=key_of(token_array(prefix)) if stable and self._prefixes.enabled else None,
            prefix_tokens=len(prefix) if stable else 0,
        )
        try:
            sampler = create_sampler(self._model, request.sampling, request.output)
        except FormatError as error:
            self._send(Failed(request.id, "output_format_invalid", str(error)))
            return
        try:
            self._scheduler.submit(job)
        except RefusedError as refusal:
            sampler.close()
            self._send(Failed(request.id, refusal.code, str(refusal), refusal.retry_after_seconds))
            return
        closing = min(CLOSING_TOKENS, job.max_tokens // 2) if request.output else 0
        text = TextStream(request.stop)
        self._generations[job.id] = _Generation(job, tokens, text, sampler, request.keep, closing)

    def _tune(self, request: Tune) -> None:
        self._scheduler.parallel = max(1, min(request.sequences, self._settings.sequences))
        self.threads = max(1, min(request.threads, self._settings.threads))
        C.llama_set_n_threads(self._context, self.threads, self.threads)
        if self._prefixes.enabled:
            self._prefixes.limit(max(1, request.prefix_cache_bytes))

    def _end(self, request_id: int) -> None:
        """Give back everything a request holds: sequence, KV cells, sampler."""
        job = self._scheduler.end(request_id)
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            generation.sampler.close()
        if job is not None and job.sequence >= 0:
            self._clear(job.sequence)

    def _clear(self, sequence: int) -> None:
        if not C.llama_memory_seq_rm(self._memory, sequence, -1, -1):
            raise LlamaError(f"llama.cpp did not release sequence {sequence}")

    # --- one step --------------------------------------------------------------------------------------

    def _fill(self, plan: list[Work]) -> dict[int, int]:
        """Put a plan into the batch; returns the batch index of each output by job id."""
        self._batch.clear()
        outputs = {}
        if self._settings.kv_apart:  # only neighbouring sequences are computed together
            plan = sorted(plan, key=lambda work: work.job.sequence)
        for work in plan:
            job, tokens = work.job, self._generations[work.job.id].tokens
            start = job.prefilled if job.phase is Phase.PREFILLING else len(tokens) - 1
            last = start + work.tokens - 1
            for position in range(start, last + 1):
                index = self._batch.add(
                    tokens[position], position, job.sequence, output=work.output and position == last
                )
            outputs[job.id] = index
        return outputs

    def _sample(self, job: Job, index: int, now: Callable[[], float]) -> None:
        generation = self._generations[job.id]
        token = generation.sampler.sample(self._context, index, closing=generation.closing)
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
        if generation.keep:
            self._keep(job, token_array(generation.tokens[: job.prompt_tokens + job.produced - 1]))
        self._end(job.id)
        self._send(
            Finished(
                id=job.id,
                reason="length" if reason == "length" else "stop",
                prompt_tokens=job.prompt_tokens,
                completion_tokens=job.produced,
                cached_tokens=job.cached,
                queue_ms=(job.admitted - job.submitted) * 1e3,
                prefill_ms=(job.first_token - job.admitted) * 1e3,
                generate_ms=(now - job.first_token) * 1e3,
            )
        )

    # --- what was computed before ----------------------------------------------------------------------

    def _reuse(self, job: Job) -> int:
        """Fill the job's sequence with what is known of its prompt; returns how many tokens that is."""
        if not self._prefixes.enabled:
            return 0
        prompt = self._generations[job.id].prompt
        length, state = self._prefixes.best(prompt, job.prefix_tokens)
        alive, other = self._best_alive(prompt)
        if other is not None and alive > length:
            C.llama_memory_seq_cp(self._memory, other.sequence, job.sequence, 0, alive)
            return alive
        return self._restore(job, state, length) if state is not None else 0

    def _best_alive(self, prompt: TokenArray) -> tuple[int, Job | None]:
        """The running job whose prompt has most in common with a new one, and how much of that is computed."""
        best: tuple[int, Job | None] = (0, None)
        if self._settings.kv_apart:
            return best  # llama.cpp copies no parts from one to another
        for other in self._scheduler.running:
            if other.phase not in (Phase.PREFILLING, Phase.DECODING):
                continue
            shared = min(common(self._generations[other.id].prompt, prompt), other.prefilled, len(prompt) - 1)
            if shared >= SHORTEST_REUSE_TOKENS and shared > best[0]:
                best = (shared, other)
        return best

    def _restore(self, job: Job, state: State, length: int) -> int:
        data = ctypes.cast(ctypes.c_char_p(state.data), ctypes.POINTER(ctypes.c_uint8))  # megabytes: no copy
        read = C.llama_state_seq_set_data(self._context, data, len(state.data), job.sequence)
        cut_off = C.llama_memory_seq_rm(self._memory, job.sequence, length, -1) if read else False
        if cut_off:
            return length
        self._prefixes.forget(state)
        self._clear(job.sequence)
        return 0

    def _remember_prefix(self, job: Job) -> None:
        """Once exactly its prefix is computed, keep that state, in memory and on disk."""
        if job.prefix is None or job.prefilled != job.prefix_tokens or job.cached == job.prefix_tokens:
            return
        tokens = token_array(self._generations[job.id].tokens[: job.prefix_tokens])
        if self._prefixes.holds(tokens):
            return
        state = self._keep(job, tokens)
        if self._snapshots is not None and state is not None:
            self._snapshots.save(state)

    def _keep(self, job: Job, tokens: TokenArray) -> State | None:
        if not self._prefixes.enabled:
            return None
        size = C.llama_state_seq_get_size(self._context, job.sequence)
        data = (ctypes.c_uint8 * size)()
        written = C.llama_state_seq_get_data(self._context, data, size, job.sequence)
        if written != size:
            return None
        state = State(tokens, bytes(data), prompt_tokens=min(job.prompt_tokens, len(tokens)))
        self._prefixes.put(state)
        return state


def _snapshots(settings: WorkerSettings, weights: str) -> Snapshots | None:
    """``weights``: an eight-bit copy has other states than the model itself."""
    if not settings.snapshots:
        return None
    build = f"{C.__version__} {C.llama_print_system_info().decode()}"
    return Snapshots(Path(settings.snapshots), f"{settings.identity} {weights} {build}")


def _create_context(model: Model, settings: WorkerSettings, batch_tokens: int) -> ctypes.c_void_p:
    params = C.llama_context_default_params()
    params.n_ctx = settings.context_tokens
    params.n_batch = batch_tokens
    params.n_ubatch = batch_tokens
    params.n_seq_max = settings.sequences
    params.n_threads = settings.threads
    params.n_threads_batch = settings.threads
    params.kv_unified = not settings.kv_apart
    params.no_perf = True
    context: ctypes.c_void_p = C.llama_init_from_model(model.handle, params)
    if not context:
        raise LlamaError(f"llama.cpp cannot create a context of {settings.context_tokens} tokens: {last_log()}")
    return context
