"""The scheduler under any interleaving of arrivals, cancellations, deadlines and steps."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edged.engine.scheduler import (
    BURST_SECONDS,
    GRID_TOKENS,
    HANDICAP_SECONDS,
    SMALLEST_PIECE_TOKENS,
    STEP_SECONDS,
    WAVE_SECONDS,
    Job,
    Phase,
    RefusedError,
    Scheduler,
    Work,
    cut,
)
from edged.types import Priority


def scheduler(*, sequences: int = 2, context: int = 100, batch: int = 16, queue: int = 8) -> Scheduler:
    return Scheduler(sequences=sequences, context_tokens=context, batch_tokens=batch, queue_limit=queue)


def job(
    number: int,
    prompt: int = 10,
    longest: int = 10,
    deadline: float | None = None,
    priority: Priority = "interactive",
) -> Job:
    return Job(number, prompt, longest, submitted=0.0, deadline=deadline, priority=priority)


def planned(machine: Scheduler, now: float = 0.0) -> list[Work]:
    """Admit and plan as the engine does it, with nothing computed before."""
    for admitted in machine.admit(now):
        machine.begin(admitted, 0)
    return machine.plan(now)


def compute(machine: Scheduler, now: float = 0.0) -> list[Work]:
    """One step as the engine does it: plan, compute, and end the jobs that have all their tokens."""
    plan = planned(machine, now)
    for work in plan:
        machine.advance(work, now)
        if work.job.produced >= work.job.max_tokens:
            machine.end(work.job.id)
    return plan


UNDER_WAY = (Phase.PREFILLING, Phase.DECODING)


def by_rank(each: Job) -> tuple[float, int]:
    return each.rank, each.id


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
        priority=st.sampled_from(sorted(HANDICAP_SECONDS)),
        prefix=st.none() | st.tuples(st.sampled_from("ab"), st.integers(1, 40)),
    )
    def submit(
        self, prompt: int, longest: int, patience: float | None, priority: Priority, prefix: tuple[str, int] | None
    ) -> None:
        self.arrived += 1
        new = job(self.arrived, prompt, longest, None if patience is None else self.now + patience)
        new.priority, new.submitted = priority, self.now
        if prefix is not None and prefix[1] < prompt:
            new.prefix, new.prefix_tokens = (None if prefix[1] % 3 == 0 else prefix), prefix[1]
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

    @rule(parallel=st.integers(1, 5))
    def tune(self, parallel: int) -> None:
        self.scheduler.parallel = min(parallel, self.sequences)

    @rule(data=st.data(), seconds=st.floats(0.001, 1.0))
    def step(self, data: st.DataObject, seconds: float) -> None:
        waiting = sorted((each for each in self.jobs.values() if each.phase is Phase.WAITING), key=by_rank)
        for begun in self.scheduler.admit(self.now):
            begun.cached = data.draw(st.integers(0, begun.prompt_tokens - 1))
            self.scheduler.begin(begun, begun.cached)
        left = [each for each in waiting if each.phase is Phase.WAITING and each.priority != "batch"]
        taken = [each for each in waiting if each.phase is not Phase.WAITING]
        assert not left or not taken or by_rank(left[0]) > max(map(by_rank, taken)), "none is overtaken"
        plan = self.scheduler.plan(self.now)
        self._check_plan(plan)
        self.scheduler.learn(plan, seconds)
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
        alarms = [each for each in self.jobs.values() if each.priority == "alarm" and each.phase in UNDER_WAY]
        for each in self.jobs.values():
            if each.phase is Phase.DECODING and each not in [work.job for work in streams]:
                assert self.now - each.first_token < BURST_SECONDS or each.priority == "batch", "who has just begun"
                assert prompts or alarms, "and only for others"
        assert all(work.tokens == 1 and work.output for work in streams)
        tokens = sum(work.tokens for work in prompts)
        if streams:
            beside = self.scheduler.pace.tokens_in(STEP_SECONDS) - len(streams)
            assert tokens <= max(SMALLEST_PIECE_TOKENS, len(streams), beside)
        elif any(each.phase is Phase.DECODING for each in self.jobs.values() if each.priority != "batch"):
            assert tokens <= max(SMALLEST_PIECE_TOKENS, self.scheduler.pace.tokens_in(WAVE_SECONDS))
        for work in prompts:
            each = work.job
            end = each.prefilled + work.tokens
            assert each.prefilled < end <= each.prompt_tokens
            assert work.output == (end == each.prompt_tokens)
            assert not each.prefilled < each.prefix_tokens < end, "the end of the prefix is a cut"

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
        self.scheduler.parallel = self.sequences
        steps = sum(each.prompt_tokens + each.max_tokens for each in self.jobs.values())
        for _ in range(steps + 1):
            if not self.scheduler.busy:
                break
            compute(self.scheduler, self.now)
        assert not self.scheduler.busy
        assert self.scheduler.reserved_tokens == 0
        for number in range(min(self.sequences, self.queue)):
            self.scheduler.submit(job(-number - 1, prompt=1, longest=1))
        self.scheduler.pace.seconds_per_token = 1e-6  # so that one wave holds all
        plan = planned(self.scheduler, self.now)
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
    planned(machine)
    machine.submit(job(2))
    with pytest.raises(RefusedError) as refusal:
        machine.submit(job(3))
    assert refusal.value.code == "queue_full"


def test_the_longest_answer_is_cut_to_what_the_context_holds() -> None:
    machine = scheduler(context=100)
    long = job(1, prompt=60, longest=1000)
    machine.submit(long)
    planned(machine)
    assert long.max_tokens == 40
    assert machine.reserved_tokens == 100


def test_a_small_job_does_not_overtake_a_large_one_that_waits_for_room() -> None:
    machine = scheduler(sequences=3, context=100)
    first, large, small = job(1, 30, 30), job(2, 60, 30), job(3, 5, 5)
    for each in (first, large, small):
        machine.submit(each)
    planned(machine)
    assert (first.phase, large.phase, small.phase) == (Phase.PREFILLING, Phase.WAITING, Phase.WAITING)
    machine.end(1)
    planned(machine)
    assert (large.phase, small.phase) == (Phase.PREFILLING, Phase.PREFILLING)


def test_a_prompt_beside_a_stream_comes_in_small_pieces_unless_the_stream_has_just_begun_and_it_ends_soon() -> None:
    machine = scheduler(context=1000, batch=256)
    stream, long = job(1, prompt=1, longest=100), job(2, prompt=500)
    machine.submit(stream)
    compute(machine)
    machine.submit(long)
    machine.pace.observe(100, 0.4)
    small = [(1, 1), (2, int(STEP_SECONDS * 250) - 1)]
    assert [(work.job.id, work.tokens) for work in planned(machine)] == small
    long.prefilled = 300
    assert [(work.job.id, work.tokens) for work in planned(machine)] == [(2, int(WAVE_SECONDS * 250))]
    assert [(work.job.id, work.tokens) for work in planned(machine, BURST_SECONDS)] == small
    stream.produced = 2
    assert [(work.job.id, work.tokens) for work in planned(machine)] == small


def test_prompts_that_come_together_are_computed_in_their_order_before_any_of_them_goes_on() -> None:
    machine = scheduler(sequences=8, context=5000, batch=256)
    machine.pace.observe(100, 0.7)
    for number in range(1, 6):
        machine.submit(job(number, prompt=16, longest=10))
    waves = [[(work.job.id, work.tokens) for work in compute(machine)] for _ in range(4)]
    assert waves[:3] == [[(1, 16), (2, 16)], [(3, 16), (4, 16)], [(5, 16)]]
    assert waves[3] == [(number, 1) for number in range(1, 6)]


def test_alarms_wait_for_alarms_that_came_with_them_and_for_nothing_else() -> None:
    machine = scheduler(sequences=4, context=5000, batch=256)
    machine.pace.observe(100, 0.7)
    priorities: tuple[Priority, ...] = ("interactive", "alarm", "alarm", "interactive")
    for number, priority in enumerate(priorities, start=1):
        machine.submit(job(number, prompt=30, longest=10, priority=priority))
    assert [[work.job.id for work in compute(machine)] for _ in range(3)] == [[2], [3], [2, 3, 1]]


def test_more_prompts_than_streams_may_wait_for_go_into_the_first_wave() -> None:
    machine = scheduler(sequences=16, context=5000, batch=512, queue=16)
    machine.pace.observe(100, 0.7)
    for number in range(16):
        machine.submit(job(number, prompt=20, longest=10))
    waves = [compute(machine) for _ in range(4)]
    assert [len(wave) for wave in waves] == [7, 2, 2, 2]


def test_pieces_beside_a_stream_shrink_at_once_when_steps_take_longer_and_grow_slowly() -> None:
    machine = scheduler(context=5000, batch=256)
    machine.submit(job(1, prompt=1, longest=100))
    compute(machine)
    machine.submit(job(2, prompt=4000))
    machine.pace.observe(100, 0.4)
    usual = planned(machine, BURST_SECONDS)
    tokens = sum(work.tokens for work in usual)
    machine.learn(usual, tokens * 0.008)
    shrunk = planned(machine, BURST_SECONDS)
    assert sum(work.tokens for work in shrunk) == int(STEP_SECONDS / 0.006)
    machine.learn(shrunk, sum(work.tokens for work in shrunk) * 0.004)
    assert sum(work.tokens for work in planned(machine, BURST_SECONDS)) == int(STEP_SECONDS / 0.0056)
    machine.learn([work for work in shrunk if work.job.id == 1], 1.0)
    assert sum(work.tokens for work in planned(machine, BURST_SECONDS)) == int(STEP_SECONDS / 0.0056)


def test_times_of_admission_and_first_token_are_those_of_their_steps() -> None:
    machine = scheduler(batch=16)
    each = job(1, prompt=20, longest=2)
    machine.submit(each)
    for now in (1.0, 2.0, 3.0):
        compute(machine, now)
    assert (each.admitted, each.first_token, each.produced) == (1.0, 2.0, 2)
    assert not machine.busy


def test_an_alarm_goes_before_all_that_wait_and_a_batch_job_that_waited_long_before_an_alarm() -> None:
    machine = scheduler(sequences=1)
    machine.submit(job(1))
    planned(machine)
    machine.submit(Job(2, 10, 10, submitted=0.0, priority="batch"))
    machine.submit(Job(3, 10, 10, submitted=5.0, priority="interactive"))
    machine.submit(Job(4, 10, 10, submitted=9.0, priority="alarm"))
    machine.submit(Job(5, 10, 10, submitted=31.0, priority="alarm"))
    order: list[int] = []
    for _ in range(4):
        machine.end(order[-1] if order else 1)
        planned(machine)
        order += [each.id for each in machine.running]
    assert order == [4, 3, 2, 5]


def test_batch_jobs_leave_the_last_sequence_free() -> None:
    machine = scheduler(sequences=3, context=1000)
    for number in range(1, 5):
        machine.submit(Job(number, 10, 10, submitted=0.0, priority="batch"))
    planned(machine)
    assert [each.id for each in machine.running] == [1, 2]
    machine.submit(Job(9, 10, 10, submitted=0.0, priority="alarm"))
    planned(machine)
    assert [each.id for each in machine.running] == [9, 1, 2]


def test_batch_streams_pause_while_an_alarm_is_answered() -> None:
    machine = scheduler(sequences=3, context=1000)
    machine.submit(Job(1, 1, 10, submitted=0.0, priority="batch"))
    compute(machine)
    machine.submit(Job(2, 1, 3, submitted=0.0, priority="alarm"))
    steps = [[work.job.id for work in compute(machine)] for _ in range(4)]
    assert steps == [[2], [2], [2], [1]]


def test_jobs_with_one_prefix_compute_it_once_and_those_with_another_do_not_wait() -> None:
    machine = scheduler(sequences=3, context=1000, batch=256)
    machine.pace.observe(100, 0.05)
    for number, prefix in ((1, "a"), (2, "a"), (3, "b")):
        machine.submit(Job(number, 50, 10, submitted=0.0, prefix=prefix, prefix_tokens=40))
    assert [(work.job.id, work.tokens) for work in compute(machine)] == [(1, 40), (3, 40)]
    (second,) = machine.admit(0.0)
    machine.begin(second, 40)
    assert [(work.job.id, work.tokens) for work in machine.plan(0.0)] == [(1, 10), (2, 10), (3, 10)]


@pytest.mark.parametrize("prefix", [0, 30, 64, 100])
@pytest.mark.parametrize("reused", [10, 64, 100, 300, 520])
def test_a_prompt_alone_is_computed_in_the_same_pieces_wherever_it_starts(prefix: int, reused: int) -> None:
    cuts = []
    for cached in (0, cut(reused, prefix)):
        machine = scheduler(context=1000, batch=256)
        machine.submit(Job(1, 600, 1, submitted=0.0, prefix="p" if prefix else None, prefix_tokens=prefix))
        (each,) = machine.admit(0.0)
        machine.begin(each, cached)
        ends = [each.prefilled]
        while each.phase is Phase.PREFILLING:
            machine.advance(machine.plan(0.0)[0], 0.0)
            ends.append(each.prefilled)
        cuts.append([end for end in ends if end >= cached])
    cold, warm = cuts
    assert [end for end in cold if end >= warm[0]] == warm
    assert all(end % GRID_TOKENS == 0 or end in (prefix, 600) for end in cold)


def test_a_full_queue_says_when_to_come_again() -> None:
    machine = scheduler(sequences=1, queue=1, context=1000)
    machine.pace.observe(100, 1.0)
    machine.submit(job(1, 10, 90))
    planned(machine)
    machine.submit(job(2, 10, 190))
    with pytest.raises(RefusedError) as refusal:
        machine.submit(job(3))
    assert refusal.value.retry_after_seconds == pytest.approx(3.0)
