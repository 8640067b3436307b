"""From samples to profiles: what is told of a second, how windows are merged, what the load score says."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import ProfileError
from edged.probe import profile as profiles
from edged.probe.profile import (
    CHANGES_KEPT,
    Device,
    Figure,
    Profile,
    Speed,
    Warmth,
    Weights,
    Work,
    from_json,
    from_msgpack,
    merge,
    to_json,
    to_msgpack,
)
from edged.probe.sample import AffinityChange, NodeSample, ProcessSample, Sample, Source, Step
from edged.types import Served
from tests.samples import NOW, counted, histogram, process, sample

DEVICE = Device(id="pi", software="1.2", cores={0: 1.0, 1: 0.5})
HOT = Warmth(celsius=61.0, headroom=19.0)


def second(*processes: ProcessSample, works: dict[str, Work] | None = None, **changes: Any) -> Profile:
    warmth = changes.pop("warmth", Warmth())
    device = changes.pop("device", DEVICE)
    return profiles.profile(sample(*processes, **changes), device, works or {}, warmth)


def value(figure: Figure[Any] | None) -> Any:
    assert figure is not None
    return figure.value


# --- one second --------------------------------------------------------------------------------------


def test_a_figure_keeps_its_source_its_confidence_and_how_long_it_was_measured() -> None:
    found = second(process(minor_faults=counted(7, Source.PROCFS, 0.5)), seconds=0.9)
    assert found.workers["chat"].minor_faults == Figure(7, 0.9, (Source.PROCFS,), 0.5)


def test_what_was_not_measured_is_not_told() -> None:
    told = msgspec.json.decode(to_json(second(process())))
    assert told["workers"]["chat"] == {"pid": 10, "threads": 4}


def test_delays_are_told_by_counts_and_percentiles() -> None:
    waits = value(second(process(run_queue=histogram(b3=98, b12=2))).workers["chat"].run_queue)
    assert waits.counts[3] == 98
    assert 8 <= waits.p50_us < 16
    assert 4096 <= waits.p99_us < 8192


def test_who_changed_an_affinity_is_told_and_how_often_that_was() -> None:
    changes = tuple(AffinityChange(caller_pid=pid, caller_name="taskset", thread=11) for pid in range(10))
    own = AffinityChange(caller_pid=process().pid, caller_name="python", thread=11)
    worker = second(process(affinity_changes=(*changes, own))).workers["chat"]
    assert value(worker.affinity_changes) == 11
    assert worker.changed_by == changes[-CHANGES_KEPT:]


def test_what_a_worker_served_comes_from_the_daemon() -> None:
    served = Served(requests=2, prompt_tokens=300, cached_tokens=100, completion_tokens=45, queue_seconds=0.5)
    works = {"chat": Work(model="tiny@1", served=served, speed=Speed(prompt=400.0, decode=60.0))}
    worker = second(process(), works=works, seconds=1.5).workers["chat"]
    assert worker.model == "tiny@1"
    assert value(worker.tokens_per_second) == 30.0
    assert (value(worker.prompt_speed), value(worker.decode_speed)) == (400.0, 60.0)
    assert worker.requests is not None
    assert worker.requests.sources == (Source.WORKER,)


def test_a_process_gets_its_part_of_the_energy_by_its_part_of_the_cpu_time() -> None:
    node = NodeSample(busy_seconds=counted({0: 1.0, 1: 1.0}), joules=counted(6.0, Source.SENSOR))
    worker = second(process(cpu_seconds={0: 0.5}), node=node).workers["chat"]
    assert worker.joules == Figure(1.5, 1.0, (Source.SENSOR,), 0.5)


def test_without_a_sensor_there_is_no_energy() -> None:
    assert second(process(cpu_seconds={0: 0.5})).workers["chat"].joules is None


def test_the_device_tells_its_cores_its_heat_and_by_which_means_it_measures() -> None:
    found = second(warmth=HOT, step=Step.COUNTERS, reason="no BTF")
    assert found.node.cores == {0: 1.0, 1: 0.5}
    assert (value(found.node.celsius), value(found.node.headroom_celsius)) == (61.0, 19.0)
    assert (found.device, found.software, found.step, found.reason) == ("pi", "1.2", Step.COUNTERS, "no BTF")
    assert (found.since, found.at) == (NOW - 1.0, NOW)


# --- merging -----------------------------------------------------------------------------------------

COUNTS = st.integers(0, 10**6)
TIMES = st.floats(0.0, 4.0, allow_nan=False)
CORES = st.dictionaries(st.integers(0, 3), TIMES, min_size=1)
HISTOGRAMS = st.lists(COUNTS, min_size=27, max_size=27).map(tuple)
SHARES = st.floats(0.0, 1.0, allow_nan=False)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    def maybe(strategy: st.SearchStrategy[Any]) -> Any:
        sources = st.sampled_from([Source.EBPF, Source.PROCFS])
        return draw(st.none() | st.builds(counted, strategy, sources, st.sampled_from([0.5, 1.0])))

    found = ProcessSample(
        name=draw(st.sampled_from(["chat", "embed"])),
        pid=draw(st.integers(1, 5)),
        threads=2,
        cpu_seconds=maybe(CORES),
        run_queue=maybe(HISTOGRAMS),
        throttled_share=maybe(SHARES),
        minor_faults=maybe(COUNTS),
        resident_bytes=maybe(COUNTS),
    )
    node = NodeSample(busy_seconds=maybe(CORES), stalled=maybe(st.just({"cpu": 0.25})), total_bytes=10**9)
    return sample(found, node=node, seconds=draw(st.floats(0.5, 2.0)))


def of(found: list[Sample]) -> list[Profile]:
    return [profiles.profile(each, DEVICE, {}, Warmth()) for each in found]


def assert_alike(first: Any, other: Any) -> None:
    """Equal but for the last bits of floats."""
    first, other = msgspec.to_builtins(first), msgspec.to_builtins(other)
    match first, other:
        case dict(), dict():
            assert first.keys() == other.keys()
            for key in first:
                assert_alike(first[key], other[key])
        case list() | tuple(), list() | tuple():
            assert len(first) == len(other)
            for pair in zip(first, other, strict=True):
                assert_alike(*pair)
        case float(), float():
            assert first == pytest.approx(other, rel=1e-9, abs=1e-9)
        case _:
            assert first == other


@given(st.lists(samples(), min_size=2, max_size=8), st.data())
def test_merged_in_parts_or_at_once_a_window_is_the_same(found: list[Sample], data: st.DataObject) -> None:
    seconds = of(found)
    cut = data.draw(st.integers(1, len(seconds) - 1))
    assert_alike(merge([merge(seconds[:cut]), merge(seconds[cut:])]), merge(seconds))


@given(st.lists(samples(), min_size=1, max_size=6))
def test_a_merged_window_has_what_the_samples_had(found: list[Sample]) -> None:
    whole = merge(of(found))
    chats = [each.processes[0] for each in found if each.processes[0].name == "chat"]
    faults = [each.minor_faults.value for each in chats if each.minor_faults is not None]
    waits = [each.run_queue.value for each in chats if each.run_queue is not None]
    memory = [each.resident_bytes.value for each in chats if each.resident_bytes is not None]
    if faults:
        assert value(whole.workers["chat"].minor_faults) == sum(faults)
    if waits:
        assert value(whole.workers["chat"].run_queue).counts == tuple(map(sum, zip(*waits, strict=True)))
    if memory:
        assert value(whole.workers["chat"].resident_bytes) == memory[-1]
        assert value(whole.workers["chat"].resident_peak_bytes) == max(memory)
    assert whole.seconds == pytest.approx(sum(each.seconds for each in found))


def test_shares_are_averaged_over_the_time_in_which_they_were_measured() -> None:
    found = merge([
        second(process(throttled_share=0.5), seconds=1.0),
        second(process(), seconds=10.0),
        second(process(throttled_share=0.0), seconds=3.0),
    ])  # fmt: skip
    assert found.workers["chat"].throttled_share == Figure(0.125, 4.0, (Source.EBPF,), 1.0)


def test_a_window_names_every_source_and_trusts_them_by_their_time() -> None:
    found = merge([
        second(process(minor_faults=1), seconds=3.0),
        second(process(minor_faults=counted(1, Source.PROCFS, 0.5)), seconds=1.0),
    ])  # fmt: skip
    assert found.workers["chat"].minor_faults == Figure(2, 4.0, (Source.EBPF, Source.PROCFS), 0.875)


def test_a_worker_that_came_or_went_is_told_of_its_own_time() -> None:
    found = merge([second(process("chat", cpu_seconds={0: 0.5})), second(process("embed", 11, cpu_seconds={1: 0.1}))])
    assert set(found.workers) == {"chat", "embed"}
    assert found.workers["chat"].cpu_seconds == Figure({0: 0.5}, 1.0, (Source.EBPF,), 1.0)


def test_step_reason_and_process_are_those_at_the_end() -> None:
    found = merge([second(process(pid=10)), second(process(pid=12), step=Step.PROCFS, reason="a container")])
    assert (found.step, found.reason, found.workers["chat"].pid) == (Step.PROCFS, "a container", 12)


def test_the_latest_changes_of_affinity_are_kept() -> None:
    changes = [AffinityChange(caller_pid=pid, caller_name="x", thread=1) for pid in range(20, 32)]
    found = merge([second(process(affinity_changes=(each,))) for each in changes])
    assert [each.caller_pid for each in found.workers["chat"].changed_by] == list(range(24, 32))
    assert value(found.workers["chat"].affinity_changes) == 12


def test_what_measuring_cost_is_added_up() -> None:
    found = merge([second(), second()])
    assert (found.probe.cpu_seconds, found.probe.kernel_seconds) == (0.004, 0.002)


# --- the load score ----------------------------------------------------------------------------------


def scored(*processes: ProcessSample, weights: Weights | None = None, **changes: Any) -> profiles.Score:
    device = msgspec.structs.replace(DEVICE, weights=weights or Weights())
    return second(*processes, device=device, **changes).score


def test_by_default_seven_tenths_of_the_score_are_free_memory_and_three_tenths_short_waits() -> None:
    found = scored(process(run_queue=histogram(b0=100)))
    assert found.parts["memory"] == 0.5
    assert found.parts["latency"] == pytest.approx(1.0, abs=0.001)
    assert found.value == pytest.approx(0.7 * 0.5 + 0.3 * 1.0, abs=0.001)


def test_requests_that_wait_lower_the_score() -> None:
    works = {"chat": Work(model="m", served=Served(requests=4, queue_seconds=0.2))}
    assert scored(process(), works=works).parts["latency"] == pytest.approx(0.5)  # 50 ms each, half_seconds


def test_an_unknown_part_does_not_count_and_lowers_the_confidence() -> None:
    found = scored()
    assert found.parts == {"memory": 0.5, "cpu": 0.5}
    assert found.value == 0.5
    assert found.confidence == pytest.approx(0.7)


def test_weights_are_free_to_choose_and_told_with_the_score() -> None:
    weights = Weights(memory=0.0, latency=0.0, cpu=2.0)
    node = NodeSample(busy_seconds=counted({0: 1.0, 1: 0.5}))
    found = scored(weights=weights, node=node)
    assert (found.value, found.confidence, found.weights) == (0.25, 1.0, weights)


def test_a_device_of_which_nothing_is_known_scores_nothing() -> None:
    found = scored(node=NodeSample())
    assert (found.value, found.confidence, found.parts) == (0.0, 0.0, {})


# --- on the wire -------------------------------------------------------------------------------------


@given(samples())
def test_a_profile_comes_back_from_json_and_msgpack_as_it_was(found: Sample) -> None:
    (whole,) = of([found])
    assert from_json(to_json(whole)) == whole
    assert from_msgpack(to_msgpack(whole)) == whole
    assert b"\n" not in to_json(whole)


def test_fields_that_were_added_later_are_ignored() -> None:
    told = msgspec.json.decode(to_json(second(process())))
    told["workers"]["chat"]["invented"] = told["invented"] = 1
    assert from_json(msgspec.json.encode(told)) == second(process())


def test_another_schema_is_refused_by_its_number() -> None:
    told = {**msgspec.json.decode(to_json(second())), "schema": 7}
    with pytest.raises(ProfileError, match="schema 7"):
        from_json(msgspec.json.encode(told))


@pytest.mark.parametrize("garbage", [b"", b"{}", b"[1]", b'{"schema": 1}', b"\xff"])
def test_what_is_no_profile_is_refused(garbage: bytes) -> None:
    with pytest.raises(ProfileError):
        from_json(garbage)
    with pytest.raises(ProfileError):
        from_msgpack(garbage)
