"""Readings of heat, memory, neighbours and drift, and what the workers, the doors and /health are told."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from edged.hardware.neighbours import FREE_OBSERVATIONS, Neighbours, Scheduled
from edged.hardware.placement import Machine, Wishes
from edged.hardware.pressure import CALM_OBSERVATIONS, Stage, Stalled
from edged.hardware.thermal import Heat, Zone
from edged.models.rollout import Role
from edged.probe.profile import Device as ProfiledDevice
from edged.probe.profile import Profile, Warmth
from edged.probe.profile import profile as make_profile
from edged.probe.sample import AffinityChange, NodeSample, ProcessSample
from edged.runtime.health import Health
from edged.serving.care import Care, HeatLimits, Readings, Sources
from edged.serving.drift import SHOW_SECONDS
from edged.serving.keeper import Keeper, Look
from edged.serving.restraint import Restraint
from edged.workers.cgroup import Drift
from edged.workers.protocol import Tune, WorkerSettings
from tests.samples import counted, histogram, process, sample

RESERVE = 100
CHAT = WorkerSettings(kind="chat", model="", threads=3, sequences=8, prefix_cache_bytes=64 << 20)
EMBED = WorkerSettings(kind="embed", model="", threads=1)
QUIET = Look({}, {})
CALM = Readings(at=0.0, available=None, stalled=None, heat=Heat(), scheduled={}, busy_seconds=0.0, look=QUIET)


class FakeWorker:
    """Settings, a process, and what it was told last."""

    def __init__(self, settings: WorkerSettings, pid: int) -> None:
        self.settings = settings
        self.pid = pid
        self.tuned: Tune | None = None

    def tune(self, tune: Tune) -> None:
        self.tuned = tune


class Device:
    """A care service on four cores, told what it reads."""

    def __init__(self) -> None:
        self.health = Health()
        self.restraint = Restraint()
        self.chat, self.embed = FakeWorker(CHAT, 10), FakeWorker(EMBED, 11)
        self.workers: Mapping[Role, Any] = {"chat": [self.chat], "embed": [self.embed]}
        self.now = 0.0
        self.care = Care(
            Keeper(Machine.of(4), Wishes(), self.health, None),
            lambda: self.workers,
            self.restraint,
            self.health,
            Sources(available=lambda: None, heat=Heat),
            HeatLimits(throttle_celsius=80.0, margin_celsius=5.0, hot_max_tokens=64),
            reserve_bytes=RESERVE,
        )

    def observe(self, times: int = 1, **changes: Any) -> None:
        for _ in range(times):
            self.now += 1.0
            self.care.observe(msgspec.structs.replace(CALM, at=self.now, **changes), self.workers)

    @property
    def codes(self) -> set[str]:
        return {held.code for held in self.health.conditions()}

    @property
    def tuned(self) -> Tune:
        assert self.chat.tuned is not None
        return self.chat.tuned


@pytest.fixture
def device() -> Device:
    return Device()


def profiled(*processes: ProcessSample, **changes: Any) -> Profile:
    found = sample(*processes, **changes)
    return make_profile(found, ProfiledDevice(id="pi", software="1", cores={}), {}, Warmth())


def hot(celsius: float, **signs: bool) -> Heat:
    return Heat(zones=(Zone("cpu-thermal", celsius, None),), **signs)


def test_a_device_at_ease_lets_the_workers_do_all_that_their_settings_allow(device: Device) -> None:
    device.observe()
    assert device.tuned == Tune(sequences=8, threads=3, prefix_cache_bytes=64 << 20)
    assert device.embed.tuned == Tune(sequences=8, threads=1, prefix_cache_bytes=0)
    assert (device.codes, device.restraint.shedding, device.restraint.longest_answer) == (set(), False, None)


def test_heat_takes_sequences_then_threads_then_tokens_back_and_says_so(device: Device) -> None:
    device.observe(heat=hot(76.0))
    assert (device.tuned.sequences, device.tuned.threads, device.codes) == (4, 3, {"hot"})
    device.observe(30, heat=hot(79.5))
    assert (device.tuned.sequences, device.tuned.threads) == (1, 1)
    assert device.restraint.longest_answer == 64
    device.observe(200, heat=hot(50.0))
    assert (device.tuned.sequences, device.tuned.threads, device.codes) == (8, 3, set())
    assert device.restraint.longest_answer is None


def test_under_voltage_and_a_slowed_cpu_are_named(device: Device) -> None:
    device.observe(heat=hot(40.0, slowed=True, under_voltage=True))
    assert device.codes == {"under_voltage", "cpu_slowed", "hot"}
    device.observe(heat=hot(40.0))
    assert device.codes == {"hot"}


def test_short_memory_sheds_batch_work_first_and_shrinks_budgets_then(device: Device) -> None:
    device.observe(available=50)
    assert (device.restraint.shedding, device.tuned.sequences) == (True, 8)
    assert device.codes == {"memory_short"}
    device.observe(available=50)
    assert device.tuned == Tune(sequences=4, threads=3, prefix_cache_bytes=32 << 20)
    device.observe(2 * CALM_OBSERVATIONS, available=500)
    assert (device.care.pressure.stage, device.restraint.shedding, device.codes) == (Stage.CALM, False, set())
    device.observe(10 * CALM_OBSERVATIONS, available=500)
    assert device.tuned == Tune(sequences=8, threads=3, prefix_cache_bytes=64 << 20)


def test_processes_that_wait_for_memory_count_as_short_memory(device: Device) -> None:
    device.observe(available=500, stalled=Stalled(0, 0))
    device.observe(available=500, stalled=Stalled(300_000, 0))
    assert device.restraint.shedding


def test_of_heat_and_memory_the_smaller_limit_holds(device: Device) -> None:
    device.observe(3, available=50, heat=hot(76.0))
    assert device.tuned.sequences == 2  # halved twice for memory; heat alone would leave 4


def test_a_neighbour_on_a_core_costs_a_thread_until_it_leaves(device: Device) -> None:
    second = 10**9
    run, waited, busy = 0, 0, 0.0
    for _ in range(5):
        device.observe(scheduled={10: Scheduled(run, waited)}, busy_seconds=busy)
        run, waited, busy = run + 2 * second, waited + second // 2, busy + 3.0
    assert (device.tuned.threads, device.codes) == (2, {"cores_crowded"})
    for _ in range(7):
        device.observe(scheduled={10: Scheduled(run, waited)}, busy_seconds=busy)
        run, busy = run + second, busy + 1.0
    assert (device.tuned.threads, device.codes) == (3, set())


def test_that_a_neighbour_left_is_seen_also_while_no_chat_worker_is_there(device: Device) -> None:
    device.care.neighbours = Neighbours(crowded=True)
    device.workers = {}
    device.observe(3, busy_seconds=9.0)
    assert "cores_crowded" in device.codes
    device.observe(FREE_OBSERVATIONS, busy_seconds=9.0)
    assert device.codes == set()


def test_cores_that_others_may_use_again_are_named(device: Device) -> None:
    device.observe(look=Look({}, {}, unreserved="services and logins may run on cores 0-2"))
    assert device.codes == {"cores_not_reserved"}
    device.observe()
    assert device.codes == set()


def test_a_drift_is_shown_for_a_while_after_it_was_repaired(device: Device) -> None:
    drifted = Look({10: [Drift("affinity", "1 threads may run on cores 1, not on cores 0")]}, {})
    device.observe(look=drifted)
    assert (device.codes, device.care.repairs) == ({"placement_drifted"}, 1)
    device.observe(int(SHOW_SECONDS) - 1)
    assert device.codes == {"placement_drifted"}
    device.observe()
    assert device.codes == set()


def test_a_quota_that_stops_a_worker_is_named_apart(device: Device) -> None:
    device.observe(look=Look({10: [Drift("stopped", "a CPU quota stopped it")]}, {}))
    assert (device.codes, device.care.repairs) == ({"cpu_quota_stops_workers"}, 0)


def test_a_neighbour_that_the_profile_shows_costs_a_thread_at_once(device: Device) -> None:
    device.observe()
    chat = process(cpu_seconds={0: 0.6}, run_queue=histogram(b2=900, b13=100))
    device.observe(profile=profiled(chat, node=NodeSample(busy_seconds=counted({0: 1.0, 1: 0.5}))))
    assert (device.tuned.threads, device.codes) == (2, {"cores_crowded"})


def test_who_changed_an_affinity_is_named_with_the_drift_even_when_heard_of_later(device: Device) -> None:
    drifted = Look({10: [Drift("affinity", "1 threads may run on cores 1, not on cores 0")]}, {})
    change = AffinityChange(caller_pid=9, caller_name="taskset", thread=10)
    device.observe(look=drifted)
    device.observe(profile=profiled(process(affinity_changes=(change,))))
    device.observe(10)
    (held,) = device.health.conditions()
    assert held.text.endswith("not on cores 0, changed by taskset (pid 9)")


def test_a_worker_that_ran_off_its_cores_or_was_stopped_by_a_quota_is_named(device: Device) -> None:
    device.observe(profile=profiled(process(cpu_seconds={3: 0.5}, throttled_share=0.5)))
    texts = {held.code: held.text for held in device.health.conditions()}
    assert texts == {
        "placement_drifted": "chat (10): it ran for 0.50 s on cores 3, not on cores 0-2",
        "cpu_quota_stops_workers": "chat (10): a CPU quota stopped it in 50% of its periods",
    }
    device.observe(int(SHOW_SECONDS))
    assert device.codes == set()


def test_another_chat_worker_begins_with_full_budgets_and_a_candidate_gets_those_of_the_active_one(
    device: Device,
) -> None:
    device.observe(2, available=50)
    candidate = FakeWorker(CHAT, 12)
    device.workers = {"chat": [device.chat, candidate]}
    device.observe(available=150)
    assert candidate.tuned == device.tuned
    assert device.tuned.sequences == 4
    device.workers = {"chat": [candidate]}
    device.observe(available=150)
    assert candidate.tuned is not None
    assert candidate.tuned.sequences == 8


def test_without_any_worker_nothing_is_told_and_the_device_is_watched_all_the_same(device: Device) -> None:
    device.workers = {}
    device.observe(heat=hot(76.0), available=50)
    assert device.codes == {"hot", "memory_short"}
