"""The ladder of the probe's means."""

from hypothesis import given
from hypothesis import strategies as st

from edged.probe.ladder import FROM_THE_TOP, LARGEST_PAUSE_SECONDS, Ladder
from edged.probe.sample import Step

NO_BCC = {Step.EBPF: "bcc is not installed"}
NOTHING = {Step.EBPF: "bcc is not installed", Step.COUNTERS: "no counters"}


def climbed(highest: Step = Step.EBPF) -> Ladder:
    ladder = Ladder(highest)
    ladder.reached(Step.COUNTERS)
    return ladder


def test_it_begins_at_the_bottom_and_tries_all_steps_from_there_up() -> None:
    ladder = Ladder(Step.EBPF)
    assert ladder.step is Step.PROCFS
    assert ladder.attempts({}, now=0.0) == [Step.COUNTERS, Step.EBPF]


def test_it_does_not_try_what_an_obstacle_forbids_and_says_which() -> None:
    ladder = climbed()
    assert ladder.attempts(NO_BCC, now=0.0) == []
    assert ladder.reason(NO_BCC) == "bcc is not installed"


def test_at_the_bottom_the_reason_is_that_of_the_next_step_up() -> None:
    assert Ladder(Step.EBPF).reason(NOTHING) == "no counters"


def test_it_goes_no_higher_than_it_was_told_and_misses_nothing_there() -> None:
    ladder = climbed(Step.COUNTERS)
    assert ladder.attempts({}, now=0.0) == []
    assert ladder.reason(NO_BCC) == ""


def test_what_failed_is_tried_again_after_pauses_that_grow_to_a_limit() -> None:
    ladder, now, pauses = climbed(), 0.0, []
    for _ in range(12):
        ladder.failed(Step.EBPF, "the verifier refused", now, random=0.999)
        began = now
        while not ladder.attempts({}, now):
            now += 1.0
        pauses.append(now - began)
    assert pauses == sorted(pauses)
    assert pauses[0] <= 10.0
    assert LARGEST_PAUSE_SECONDS - 10 < pauses[-1] <= LARGEST_PAUSE_SECONDS
    assert ladder.reason({}) == "the verifier refused"


def test_once_an_obstacle_is_gone_a_failure_before_it_is_no_reason_to_wait() -> None:
    ladder = climbed()
    for _ in range(8):
        ladder.failed(Step.EBPF, "could not compile", now=0.0, random=0.9)
    assert ladder.attempts({}, now=1.0) == []
    assert ladder.attempts(NO_BCC, now=2.0) == []
    assert ladder.attempts({}, now=3.0) == [Step.EBPF]


def test_it_falls_one_step_when_the_one_it_stands_on_fails_and_comes_back() -> None:
    ladder = climbed()
    ladder.reached(Step.EBPF)
    assert ladder.reason({}) == ""
    ladder.failed(Step.EBPF, "the kernel refused", now=0.0, random=0.5)
    assert ladder.step is Step.COUNTERS
    assert ladder.reason({}) == "the kernel refused"
    assert ladder.attempts({}, now=60.0) == [Step.EBPF]


@given(st.data())
def test_whatever_happens_it_stands_at_most_at_the_highest_step_and_tries_only_what_may_be(data: st.DataObject) -> None:
    highest = data.draw(st.sampled_from(Step))
    ladder, now = Ladder(highest), 0.0
    for _ in range(20):
        now += data.draw(st.floats(0.0, 100.0))
        obstacles = data.draw(st.dictionaries(st.sampled_from([Step.EBPF, Step.COUNTERS]), st.just("no")))
        for step in ladder.attempts(obstacles, now):
            assert step not in obstacles
            assert FROM_THE_TOP.index(highest) <= FROM_THE_TOP.index(step) < FROM_THE_TOP.index(ladder.step)
            if data.draw(st.booleans()):
                ladder.reached(step)
            else:
                ladder.failed(step, "failed", now, data.draw(st.floats(0.0, 0.99)))
    assert FROM_THE_TOP.index(ladder.step) >= FROM_THE_TOP.index(highest)
