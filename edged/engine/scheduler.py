"""Who decodes next: pure bookkeeping of waiting and running jobs; no llama.cpp, no clock.

Every step first gives each decoding job its one token, then fills the rest of the step with pieces of prompts in
order of arrival. While others decode, prompt pieces stay small so that running streams do not stall.
A job is admitted when a sequence is free and the KV cache has room for its prompt and its longest answer.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

PREFILL_TOKENS_BESIDE_STREAMS = 64


class Phase(Enum):
    """WAITING → PREFILLING → DECODING; a job that ends leaves from any phase."""

    WAITING = auto()
    PREFILLING = auto()
    DECODING = auto()


@dataclass(slots=True)
class Job:
    """One generation. Times are seconds of one monotonic clock, counts are tokens."""

    id: int
    prompt_tokens: int
    max_tokens: int
    submitted: float
    deadline: float | None = None
    phase: Phase = Phase.WAITING
    sequence: int = -1
    prefilled: int = 0
    produced: int = 0
    admitted: float = 0.0
    first_token: float = 0.0

    @property
    def reserved_tokens(self) -> int:
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """A job's share of one step: the next ``tokens`` tokens; with ``output`` the last one yields logits."""

    job: Job
    tokens: int
    output: bool


class RefusedError(Exception):
    """A job that cannot be taken; ``code`` is one of the worker errors of :mod:`edged.errors`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Scheduler:
    """Jobs of one context: ``sequences`` at a time over ``context_tokens`` of shared KV cache."""

    def __init__(self, *, sequences: int, context_tokens: int, batch_tokens: int, queue_limit: int) -> None:
        self._context_tokens = context_tokens
        self._batch_tokens = max(batch_tokens, sequences)
        self._queue_limit = queue_limit
        self._free_sequences = list(range(sequences - 1, -1, -1))
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def reserved_tokens(self) -> int:
        """KV cells promised to running jobs."""
        return sum(job.reserved_tokens for job in self._running.values())

    def submit(self, job: Job) -> None:
        """Queue a job. Raises :class:`RefusedError` when it can never fit or the queue is full."""
        if job.prompt_tokens + 1 > self._context_tokens:
            raise RefusedError(
                "prompt_too_long",
                f"the prompt has {job.prompt_tokens} tokens, the context holds {self._context_tokens}",
            )
        if len(self._waiting) >= self._queue_limit:
            raise RefusedError("queue_full", f"{self._queue_limit} requests are waiting already")
        job.max_tokens = max(1, min(job.max_tokens, self._context_tokens - job.prompt_tokens))
        self._waiting.append(job)

    def end(self, job_id: int) -> Job | None:
        """Take a job out, whatever its phase; its sequence and cells are free at once. None if unknown."""
        job = self._running.pop(job_id, None)
        if job is not None:
            self._free_sequences.append(job.sequence)
            return job
        for waiting in self._waiting:
            if waiting.id == job_id:
                self._waiting.remove(waiting)
                return waiting
        return None

    def overdue(self, now: float) -> list[Job]:
        """Jobs whose deadline has passed; the caller ends them."""
        jobs = [*self._running.values(), *self._waiting]
        return [job for job in jobs if job.deadline is not None and now >= job.deadline]

    def plan(self, now: float) -> list[Work]:
        """The next step: admits what fits, and shares out the step's tokens. Empty when nothing is to do."""
        self._admit(now)
        decoding = [job for job in self._running.values() if job.phase is Phase.DECODING]
        work = [Work(job, 1, output=True) for job in decoding]
        room = self._batch_tokens - len(work)
        if decoding:
            room = min(room, PREFILL_TOKENS_BESIDE_STREAMS)
        for job in self._running.values():
            if job.phase is Phase.PREFILLING and room > 0:
                left = job.prompt_tokens - job.prefilled
                tokens = min(left, room)
                work.append(Work(job, tokens, output=tokens == left))
                room -= tokens
        return work

    def advance(self, work: Work, now: float) -> None:
        """Record that ``work`` was computed; a job with output has one more token."""
        job = work.job
        if job.phase is Phase.PREFILLING:
            job.prefilled += work.tokens
        if not work.output:
            return
        if job.phase is Phase.PREFILLING:
            job.phase = Phase.DECODING
            job.first_token = now
        job.produced += 1

    def _admit(self, now: float) -> None:
        reserved = self.reserved_tokens
        while self._waiting and self._free_sequences:
            job = self._waiting[0]
            if reserved + job.reserved_tokens > self._context_tokens:
                return  # in order of arrival: a later, smaller job does not overtake for ever
            self._waiting.popleft()
            job.phase = Phase.PREFILLING
            job.sequence = self._free_sequences.pop()
            job.admitted = now
            reserved += job.reserved_tokens
            self._running[job.id] = job
