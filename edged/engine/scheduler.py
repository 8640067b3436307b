"""Who decodes next: pure bookkeeping of waiting and running jobs; no llama.cpp, no clock.

Every step gives each decoding job its one token, then fills what is left with pieces of prompts. Beside running streams
those pieces are cut so that a step takes ``STEP_SECONDS``, or has as many tokens of prompts as of streams.

Prompts that came together are computed in their order before any of them goes on, as many in a step as take
``WAVE_SECONDS``: most have their first token sooner than at the end of one long step. By the observed pace no stream
waits longer than ``BURST_SECONDS`` for that: what is more goes before the first of them, or beside them all. Alarms
go alone, and one that has its first token waits for other alarms only.

Alone, pieces end on a fixed grid, so that a prompt is always computed in the same pieces, whatever of it was there.

Jobs go in the order of submission plus the handicap of their class: an alarm overtakes a batch job that came up to
``HANDICAP_SECONDS["batch"]`` earlier, and none that has waited longer. A job is admitted when a sequence is free and
the KV cache has room for its prompt and its longest answer.
"""

import bisect
import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum, auto

from edged.types import Priority

HANDICAP_SECONDS: dict[Priority, float] = {"alarm": 0.0, "interactive": 10.0, "batch": 30.0}
STEP_SECONDS = 0.075
WAVE_SECONDS = 0.3
BURST_SECONDS = 1.5
GRID_TOKENS = 256
SMALLEST_PIECE_TOKENS = 4
WEIGHT_OF_SLOWER = 0.5
WEIGHT_OF_FASTER = 0.2
SLOWEST_TOKENS_PER_SECOND = 30.0


class Phase(Enum):
    """WAITING → ADMITTED → PREFILLING → DECODING; a job that ends leaves from any phase."""

    WAITING = auto()
    ADMITTED = auto()
    PREFILLING = auto()
    DECODING = auto()


_UNDER_WAY = (Phase.PREFILLING, Phase.DECODING)


@dataclass(slots=True, eq=False)
class Job:
    """One generation. Times are seconds of one monotonic clock, counts are tokens.

    ``prefix`` names the stable first ``prefix_tokens`` of the prompt: what is equal needs computing once.
    """

    id: int
    prompt_tokens: int
    max_tokens: int
    submitted: float
    priority: Priority = "interactive"
    deadline: float | None = None
    prefix: Hashable = None
    prefix_tokens: int = 0
    phase: Phase = Phase.WAITING
    sequence: int = -1
    cached: int = 0
    prefilled: int = 0
    produced: int = 0
    admitted: float = 0.0
    first_token: float = 0.0

    @property
    def reserved_tokens(self) -> int:
        return self.prompt_tokens + self.max_tokens

    @property
    def rank(self) -> float:
        """The smaller goes first. It never changes: all that wait grow older alike."""
        return self.submitted + HANDICAP_SECONDS[self.priority]

    @property
    def left_tokens(self) -> int:
        return self.prompt_tokens - self.prefilled + self.max_tokens - self.produced


@dataclass(frozen=True, slots=True)
class Work:
    """A job's share of one step: the next ``tokens`` tokens; with ``output`` the last one yields logits."""

    job: Job
    tokens: int
    output: bool


class RefusedError(Exception):
    """A job that cannot be taken; ``code`` is one of the worker errors of :mod:`edged.errors`."""

    def __init__(self, code: str, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_seconds = retry_after_seconds


class Pace:
    """The observed cost of a token in a step: a slower one counts half because streams wait, a faster one a fifth."""

    def __init__(self) -> None:
        self.seconds_per_token = 1.0 / SLOWEST_TOKENS_PER_SECOND
        self._known = False

    def observe(self, tokens: int, seconds: float) -> None:
        change = seconds / tokens - self.seconds_per_token
        weight = WEIGHT_OF_SLOWER if change > 0 else WEIGHT_OF_FASTER
        self.seconds_per_token += change * (weight if self._known else 1.0)
        self._known = True

    def tokens_in(self, seconds: float) -> int:
        return int(seconds / self.seconds_per_token)


class Scheduler:
    """Jobs of one context: ``sequences`` at a time over ``context_tokens`` of shared KV cache.

    ``parallel`` may be lowered at any time, and raised up to ``sequences``; what runs is left to finish.
    """

    def __init__(self, *, sequences: int, context_tokens: int, batch_tokens: int, queue_limit: int) -> None:
        self.parallel = sequences
        self.pace = Pace()
        self._context_tokens = context_tokens
        self._batch_tokens = max(batch_tokens, sequences)
        self._queue_limit = queue_limit
        self._free_sequences = list(range(sequences))  # a heap: those in use stay close together
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def reserved_tokens(self) -> int:
        """KV cells promised to running jobs."""
        return sum(job.reserved_tokens for job in self._running.values())

    @property
    def running(self) -> list[Job]:
        """Jobs that hold a sequence, in their order."""
        jobs = self._running.values()
        return sorted(jobs, key=_order) if len(jobs) > 1 else list(jobs)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises :class:`RefusedError` when it can never fit or the queue is full."""
        if job.prompt_tokens + 1 > self._context_tokens:
            raise RefusedError(
                "prompt_too_long",
                f"the prompt has {job.prompt_tokens} tokens, the context holds {self._context_tokens}",
            )
        if len(self._waiting) >= self._queue_limit:
            raise RefusedError("queue_full", f"{self._queue_limit} requests are waiting already", self.wait_seconds())
        job.max_tokens = max(1, min(job.max_tokens, self._context_tokens - job.prompt_tokens))
        bisect.insort(self._waiting, job, key=_order)

    def wait_seconds(self) -> float:
        """How long all the work that is there takes at the observed pace, at most."""
        jobs = [*self._running.values(), *self._waiting]
        return sum(job.left_tokens for job in jobs) * self.pace.seconds_per_token

    def end(self, job_id: int) -> Job | None:
        """Take a job out, whatever its phase; its sequence and cells are free at once. None if unknown."""
        job = self._running.pop(job_id, None)
        if job is not None:
            heapq.heappush(self._free_sequences, job.sequence)
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

    def admit(self, now: float) -> list[Job]:
        """Give sequences to waiting jobs, and name the admitted ones that may begin: see :meth:`begin`.

        A job whose prefix another one is computing does not begin yet, but after it.
        """
        self._take_in(now)
        if all(job.phase in _UNDER_WAY for job in self._running.values()):
            return []
        computing = {job.prefix for job in self._awake() if _computes_prefix(job)}
        begin = []
        for job in self.running:
            if job.phase is not Phase.ADMITTED or job.prefix in computing:
                continue
            begin.append(job)
            if job.prefix is not None:
                computing.add(job.prefix)
        return begin

    def begin(self, job: Job, cached: int) -> None:
        """Start an admitted job, the first ``cached`` tokens of whose prompt are in its sequence already."""
        job.phase = Phase.PREFILLING
        job.cached = job.prefilled = cached

    def plan(self, now: float) -> list[Work]:
        """The next step: shares out its tokens. Empty when nothing has begun."""
        awake = self._awake()
        streams = [job for job in awake if job.phase is Phase.DECODING]
        prompts = [job for job in awake if job.phase is Phase.PREFILLING]
        first = _alarms(prompts) or prompts
        if first and self._is_burst(streams, first, now):
            return self._wave(first, streams)
        work = [Work(job, 1, output=True) for job in streams]
        # Many streams alone can fill a step; prompts get as much of it as they.
        room = max(SMALLEST_PIECE_TOKENS, len(work), self.pace.tokens_in(STEP_SECONDS) - len(work))
        room = min(room, self._batch_tokens - len(work))
        for job in prompts:
            if room > 0:
                work.append(self._prefill(job, room))
                room -= work[-1].tokens
        return work

    def learn(self, plan: list[Work], seconds: float) -> None:
        """Take into account how long a step took, before it is recorded. One without prompts tells nothing: few tokens
        cost by the weights of the model, not by their number."""
        prompts = sum(work.tokens for work in plan if work.job.phase is Phase.PREFILLING)
        if prompts >= SMALLEST_PIECE_TOKENS and seconds > 0:
            self.pace.observe(sum(work.tokens for work in plan), seconds)

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

    def _take_in(self, now: float) -> None:
        if not self._waiting:
            return
        reserved = self.reserved_tokens
        batch_jobs = sum(job.priority == "batch" for job in self._running.values())
        for job in list(self._waiting):
            if len(self._running) >= self.parallel or reserved + job.reserved_tokens > self._context_tokens:
                return  # in their order: a later, smaller job does not overtake for ever
            if job.priority == "batch" and batch_jobs and batch_jobs >= self.parallel - 1:
                continue  # the last sequence is for whoever is in more of a hurry
            self._waiting.remove(job)
            job.phase = Phase.ADMITTED
            job.sequence = heapq.heappop(self._free_sequences)
            job.admitted = now
            reserved += job.reserved_tokens
            batch_jobs += job.priority == "batch"
            self._running[job.id] = job

    def _awake(self) -> list[Job]:
        """All running jobs, without the batch jobs that pause for an alarm under way."""
        running = self.running
        if all(job.priority == "interactive" for job in running):
            return running
        alarm = next((job for job in running if job.priority == "alarm" and job.phase in _UNDER_WAY), None)
        if alarm is None:
            return running
        return [job for job in running if job.priority != "batch" or job.rank < alarm.rank]

    def _is_burst(self, streams: list[Job], prompts: list[Job], now: float) -> bool:
        """Whether the prompts go first: they end soon, and no stream has gone on yet. Alarms wait for alarms alone."""
        if not streams:
            return True
        if _alarms(streams) and not _alarms(prompts):
            return False
        waited = now - min(stream.first_token for stream in streams)
        needed = _left(prompts) * self.pace.seconds_per_token
        return all(stream.produced == 1 for stream in streams) and waited + needed <= BURST_SECONDS

    def _wave(self, prompts: list[Job], streams: list[Job]) -> list[Work]:
        """A piece of the first prompt, and those after it that fit as a whole."""
        wave = longest = max(SMALLEST_PIECE_TOKENS, self.pace.tokens_in(WAVE_SECONDS))
        if not streams:
            wave = max(wave, _left(prompts) - self.pace.tokens_in(BURST_SECONDS - WAVE_SECONDS))
            longest = self._batch_tokens
        work = [self._prefill(prompts[0], min(longest, self._batch_tokens))]
        room = min(wave, self._batch_tokens) - work[0].tokens
        for job in prompts[1:]:
            if self._piece(job) > room:
                break
            work.append(self._prefill(job, room))
            room -= work[-1].tokens
        return work

    def _prefill(self, job: Job, room: int) -> Work:
        tokens = min(room, self._piece(job))
        return Work(job, tokens, output=job.prefilled + tokens == job.prompt_tokens)

    def _piece(self, job: Job) -> int:
        """The longest next piece of a prompt: never across the end of its prefix, alone never across the grid."""
        end = job.prefix_tokens if job.prefilled < job.prefix_tokens else job.prompt_tokens
        if len(self._running) == 1:
            end = min(end, (job.prefilled // GRID_TOKENS + 1) * GRID_TOKENS)
        return end - job.prefilled


def cut(tokens: int, prefix_tokens: int) -> int:
    """The last place, at or before ``tokens``, where a prompt that runs alone is cut into pieces."""
    grid = tokens // GRID_TOKENS * GRID_TOKENS
    return max(grid, prefix_tokens) if prefix_tokens <= tokens else grid


def _left(prompts: list[Job]) -> int:
    return sum(job.prompt_tokens - job.prefilled for job in prompts)


def _alarms(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.priority == "alarm"]


def _computes_prefix(job: Job) -> bool:
    return job.prefix is not None and job.phase is Phase.PREFILLING and job.prefilled < job.prefix_tokens


def _order(job: Job) -> tuple[float, int]:
    return job.rank, job.id
