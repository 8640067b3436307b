"""The scheduler under any interleaving of arrivals, cancellations, deadlines and steps."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edged.engine.scheduler import (
    PREFILL_TOKENS_BESIDE_STREAMS,
    Job,
    Phase,
    RefusedError,
    Scheduler,
    Work,
)


def scheduler(*, sequences: int = 2, context: int = 100, batch: int = 16, queue: int = 8) -> Scheduler:
    return Scheduler(sequences=sequences, context_tokens=context, batch_tokens=batch, queue_limit=queue)


def job(number: int, prompt: int = 10, longest: int = 10, deadline: float | None = None) -> Job:
    return Job(number, prompt, longest, submitted=0.0, deadline=deadline)


def compute(machine: Scheduler, now: float = 0.0) -> list[Work]:
    """One step as the engine does it: plan, compute, and end the jobs that have all their tokens."""
    plan = machine.plan(now)
    for work in plan:
        machine.advance(work, now)
        if work.job.produced >= work.job.max_tokens:
            machine.end(work.job.id)
    return plan


class SchedulerMachine(RuleBasedStateMachine):
    """Plays the engine and its askers at random, and checks what must always hold."""

    @initialize(
        sequences=st.integers(1, 5), context=st.integers(8, 300), batch=st.integers(1, 96), queue=st.integers(1, 6)
    )
    def begin(self, sequences: int, context: int, batch: int, queue: int) -> None:
        self.sequences, self.context, self.queue = sequences, context, queue
        self.batch = max(batch, sequences)
        self.scheduler = scheduler(sequences=sequences, context=context, batch=batch, queue=queue)
        self.jobs: dict[int, Job] = {}
        self.arrived = 0
        self.now = 0.0
        self.admitted: list[int] = []

    @rule(
        prompt=st.integers(1, 320),
        longest=st.integers(-50, 320),
        patience=st.none() | st.floats(0, 20),
    )
    def submit(self, prompt: int, longest: int, patience: float | None) -> None:
        self.arrived += 1
        new = job(self.arrived, prompt, longest, None if patience is None else self.now + patience)
        try:
            self.scheduler.submit(new)
        except RefusedError as refusal:
            waiting = [each for each in self.jobs.values() if each.phase is Phase.WAITING]
            expected = "prompt_too_long" if prompt + 1 > self.context else "queue_full"
            assert refusal.code == expected
            assert expected == "prompt_too_long" or len(waiting) == self.queue
            return
        self.jobs[new.id] = new

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.jobs)))
        assert self.scheduler.end(chosen) is self.jobs.pop(chosen)
        assert self.scheduler.end(chosen) is None

    @rule(seconds=st.floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        late = {each.id for each in self.jobs.values() if each.deadline is not None and self.now >= each.deadline}
        overdue = [each.id for each in self.scheduler.overdue(self.now)]
        assert sorted(overdue) == sorted(late)
        for number in overdue:
            self.scheduler.end(number)
            del self.jobs[number]

    @rule()
    def step(self) -> None:
        waiting = [each.id for each in self.jobs.values() if each.phase is Phase.WAITING]
        plan = self.scheduler.plan(self.now)
        admitted = [number for number in waiting if self.jobs[number].phase is not Phase.WAITING]
        assert admitted == waiting[: len(admitted)], "admission in order of arrival"
        self._check_plan(plan)
        for work in plan:
            self.scheduler.advance(work, self.now)
            if work.job.produced >= work.job.max_tokens:
                self.scheduler.end(work.job.id)
                del self.jobs[work.job.id]

    def _check_plan(self, plan: list[Work]) -> None:
        assert bool(plan) == bool(self.jobs), "whatever is there makes progress"
        assert sum(work.tokens for work in plan) <= self.batch
        assert len({work.job.id for work in plan}) == len(plan)
        streams = [work for work in plan if work.job.phase is Phase.DECODING]
        prompts = [work for work in plan if work.job.phase is Phase.PREFILLING]
        decoding = [each for each in self.jobs.values() if each.phase is Phase.DECODING]
        assert len(streams) == len(decoding), "every stream gets its token in every step"
        assert all(work.tokens == 1 and work.output for work in streams)
        assert [work.job.id for work in prompts] == sorted(work.job.id for work in prompts)
        if streams:
            assert sum(work.tokens for work in prompts) <= PREFILL_TOKENS_BESIDE_STREAMS
        for work in prompts:
            assert 1 <= work.tokens <= work.job.prompt_tokens - work.job.prefilled
            assert work.output == (work.job.prefilled + work.tokens == work.job.prompt_tokens)

    @invariant()
    def resources_are_those_of_the_running_jobs(self) -> None:
        if not hasattr(self, "jobs"):
            return
        running = [each for each in self.jobs.values() if each.phase is not Phase.WAITING]
        held = [each.sequence for each in running]
        assert len(set(held)) == len(held) <= self.sequences
        assert set(held) <= set(range(self.sequences))
        assert self.scheduler.reserved_tokens == sum(each.reserved_tokens for each in running) <= self.context
        assert all(each.prefilled + max(0, each.produced - 1) <= each.reserved_tokens for each in running)
        assert self.scheduler.busy == bool(self.jobs)

    def teardown(self) -> None:
        """Whatever happened, the rest finishes in a bounded number of steps, and nothing is left behind."""
        if not hasattr(self, "jobs"):
            return
        steps = sum(each.prompt_tokens + each.max_tokens for each in self.jobs.values())
        for _ in range(steps + 1):
            if not self.scheduler.busy:
                break
            compute(self.scheduler, self.now)
        assert not self.scheduler.busy
        assert self.scheduler.reserved_tokens == 0
        for number in range(min(self.sequences, self.queue)):
            self.scheduler.submit(job(-number - 1, prompt=1, longest=1))
        plan = self.scheduler.plan(self.now)
        expected = min(self.sequences, self.queue, self.context // 2)
        assert len({work.job.sequence for work in plan}) == expected, "all sequences are free again"


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def test_a_prompt_that_leaves_no_room_for_one_token_is_refused() -> None:
    machine = scheduler(context=100)
    with pytest.raises(RefusedError) as refusal:
        machine.submit(job(1, prompt=100))
    assert refusal.value.code == "prompt_too_long"
    machine.submit(job(2, prompt=99))


def test_the_queue_limit_counts_those_that_wait_and_not_those_that_run() -> None:
    machine = scheduler(sequences=1, queue=1)
    machine.submit(job(1))
    machine.plan(0.0)
    machine.submit(job(2))
    with pytest.raises(RefusedError) as refusal:
        machine.submit(job(3))
    assert refusal.value.code == "queue_full"


def test_the_longest_answer_is_cut_to_what_the_context_holds() -> None:
    machine = scheduler(context=100)
    long = job(1, prompt=60, longest=1000)
    machine.submit(long)
    machine.plan(0.0)
    assert long.max_tokens == 40
    assert machine.reserved_tokens == 100


def test_a_small_job_does_not_overtake_a_large_one_that_waits_for_room() -> None:
    machine = scheduler(sequences=3, context=100)
    first, large, small = job(1, 30, 30), job(2, 60, 30), job(3, 5, 5)
    for each in (first, large, small):
        machine.submit(each)
    machine.plan(0.0)
    assert (first.phase, large.phase, small.phase) == (Phase.PREFILLING, Phase.WAITING, Phase.WAITING)
    machine.end(1)
    machine.plan(0.0)
    assert (large.phase, small.phase) == (Phase.PREFILLING, Phase.PREFILLING)


def test_a_prompt_beside_a_stream_comes_in_small_pieces() -> None:
    machine = scheduler(context=1000, batch=256)
    stream, long = job(1, prompt=1, longest=100), job(2, prompt=500)
    machine.submit(stream)
    compute(machine)
    machine.submit(long)
    assert [(work.job.id, work.tokens) for work in machine.plan(0.0)] == [(1, 1), (2, PREFILL_TOKENS_BESIDE_STREAMS)]


def test_times_of_admission_and_first_token_are_those_of_their_steps() -> None:
    machine = scheduler(batch=16)
    each = job(1, prompt=20, longest=2)
    machine.submit(each)
    for now in (1.0, 2.0, 3.0):
        compute(machine, now)
    assert (each.admitted, each.first_token, each.produced) == (1.0, 2.0, 2)
    assert not machine.busy
