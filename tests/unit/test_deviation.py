"""Where a profile differs from the plan, and what is said of it."""

from typing import Any

import pytest

from edged.hardware.placement import Bounds, Machine, Placement, place
from edged.probe.profile import Device, Profile, Warmth, profile
from edged.probe.sample import AffinityChange, NodeSample, Source
from edged.serving.deviation import Deviation, blame, deviations
from edged.serving.drift import BLAME_SECONDS, SHOW_SECONDS, Drifts
from tests.samples import counted, histogram, process, sample

PLACEMENT = place(Machine.of(4))  # the chat worker on three cores, embedder and daemon on the fourth
OWN, OTHER = PLACEMENT.chat.cores[0], PLACEMENT.embed.cores[0]
QUIET, WAITING = histogram(b2=1000), histogram(b2=900, b13=100)


def told(*processes: Any, busy: dict[int, float] | None = None) -> Profile:
    node = NodeSample(busy_seconds=counted(busy or {0: 0.0}))
    return profile(sample(*processes, node=node), Device(id="pi", software="1", cores={}), {}, Warmth())


def found(profile: Profile, placement: Placement = PLACEMENT) -> list[str]:
    return [each.kind for each in deviations(profile, placement)]


def test_a_worker_on_its_cores_deviates_in_nothing() -> None:
    assert found(told(process(cpu_seconds={OWN: 0.9}, run_queue=QUIET, throttled_share=0.0))) == []


def test_a_worker_that_ran_on_other_cores_is_told_with_the_time() -> None:
    (deviation,) = deviations(told(process(cpu_seconds={OWN: 0.5, OTHER: 0.25})), PLACEMENT)
    text = f"it ran for 0.25 s on cores {OTHER}, not on cores 0-2"
    assert deviation == Deviation("off_cores", "chat", 10, text)


def test_a_moment_on_another_core_is_no_deviation() -> None:
    assert found(told(process(cpu_seconds={OWN: 0.9, OTHER: 0.015}))) == []
    assert found(told(process(cpu_seconds={OWN: 2.9, OTHER: 0.1}))) == []


def test_where_threads_ran_is_believed_only_where_it_was_counted() -> None:
    sampled = counted({OTHER: 0.9}, Source.PROCFS, 0.5)
    assert found(told(process(cpu_seconds=sampled))) == []


def test_every_process_is_held_to_its_own_cores() -> None:
    processes = [process(name, pid, cpu_seconds={OWN: 0.5}) for pid, name in enumerate(("embed", "daemon"), 11)]
    assert found(told(*processes)) == ["off_cores", "off_cores"]
    assert found(told(process("chat-candidate", 13, cpu_seconds={OWN: 0.5}))) == []
    assert found(told(process("stranger", 14, cpu_seconds={OWN: 0.5}))) == []


def test_a_quota_that_stops_a_worker_is_told_unless_it_was_planned() -> None:
    stopped = told(process(throttled_share=0.34))
    (deviation,) = deviations(stopped, PLACEMENT)
    assert (deviation.kind, deviation.text) == ("throttled", "a CPU quota stopped it in 34% of its periods")
    planned = Bounds(cores=(0, 1), threads=2, weight=100, nice=0, quota_cores=1.0)
    by_plan = Placement(chat=planned, embed=PLACEMENT.embed, daemon=PLACEMENT.daemon)
    assert found(stopped, by_plan) == []
    assert found(told(process(throttled_share=0.05))) == []


def test_a_worker_behind_a_busy_neighbour_is_starved_in_the_first_second() -> None:
    chat = process(cpu_seconds={OWN: 0.6}, run_queue=WAITING)
    (deviation,) = deviations(told(chat, busy={OWN: 1.0, OTHER: 0.2, 1: 0.3}), PLACEMENT)
    assert deviation.kind == "starved"
    assert deviation.text.startswith("one in a hundred of its waits for cores 0-2 took 15")


@pytest.mark.parametrize(
    ("chat", "busy"),
    [
        (process(cpu_seconds={OWN: 0.6}, run_queue=QUIET), {OWN: 1.0, 1: 1.0}),  # outweighed: nobody waits
        (process(cpu_seconds={OWN: 0.9}, run_queue=WAITING), {OWN: 1.0}),  # its threads wait for each other
        (process(cpu_seconds={OWN: 0.6}, run_queue=WAITING), {OWN: 0.6, OTHER: 1.0}),  # the neighbour is elsewhere
        (process(cpu_seconds={OWN: 0.01}, run_queue=WAITING), {OWN: 1.0}),  # it hardly wanted to run
        (process(cpu_seconds={OWN: 0.6}, run_queue=counted(WAITING, Source.PROCFS, 0.5)), {OWN: 1.0, 1: 1.0}),
        (process(cpu_seconds={OWN: 0.6}), {OWN: 1.0, 1: 1.0}),
    ],
)
def test_other_waits_and_other_neighbours_do_not_starve_it(chat: Any, busy: dict[int, float]) -> None:
    assert found(told(chat, busy=busy)) == []


def test_a_worker_of_edged_on_the_same_cores_is_no_neighbour() -> None:
    chat = process(cpu_seconds={OWN: 0.6}, run_queue=WAITING)
    daemon = process("other", 5, cpu_seconds={OWN: 0.4, 1: 0.5})
    assert found(told(chat, daemon, busy={OWN: 1.0, 1: 0.5})) == []


def test_the_last_one_who_changed_an_affinity_is_to_blame_but_not_edged_itself() -> None:
    callers = ((7, "cat"), (9, "taskset"), (1, "edged"))
    changes = tuple(AffinityChange(caller_pid=pid, caller_name=name, thread=10) for pid, name in callers)
    worker = told(process(affinity_changes=changes)).workers["chat"]
    assert blame(worker, own_pid=1) == "changed by taskset (pid 9)"
    assert blame(told(process()).workers["chat"], own_pid=1) == ""


# --- what drifted of late ----------------------------------------------------------------------------


@pytest.mark.parametrize("blamed_at", [98.0, 100.0, 102.5])
def test_who_did_it_is_named_whether_it_was_heard_before_or_after(blamed_at: float) -> None:
    drifts = Drifts()
    for now in sorted({100.0, blamed_at}):
        if now == blamed_at:
            drifts.blame("drift", 10, "changed by taskset (pid 9)", now)
        if now == 100.0:
            drifts.find("drift", 10, "it may run on core 3", now)
    assert drifts.text("drift", 110.0) == "it may run on core 3, changed by taskset (pid 9)"


def test_nobody_is_blamed_for_what_was_found_at_another_time_or_of_another_process() -> None:
    drifts = Drifts()
    drifts.find("drift", 10, "it may run on core 3", 100.0)
    drifts.blame("drift", 11, "changed by taskset (pid 9)", 100.0)
    drifts.blame("drift", 10, "changed by cron (pid 8)", 100.1 + BLAME_SECONDS)
    drifts.blame("other", 10, "changed by cron (pid 8)", 100.0)
    assert drifts.text("drift", 105.0) == "it may run on core 3"


def test_a_drift_is_told_for_a_while_and_each_kind_apart() -> None:
    drifts = Drifts()
    drifts.find("drift", 10, "here", 100.0)
    assert (drifts.text("drift", 99.0 + SHOW_SECONDS), drifts.text("other", 100.0)) == ("here", "")
    assert drifts.text("drift", 100.0 + SHOW_SECONDS) == ""
    assert drifts.text("drift", 100.0) == ""
