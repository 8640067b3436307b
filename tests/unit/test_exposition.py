"""What Prometheus is told of profiles."""

from prometheus_client.parser import text_string_to_metric_families

from edged.probe.exposition import Exposition
from edged.probe.profile import Device, Warmth
from edged.probe.profiles import Profiles
from edged.probe.sample import Step
from edged.runtime.health import Health
from edged.runtime.metrics import Metrics
from tests.samples import NOW, histogram, process, sample


def exposed(profiles: Profiles) -> dict[tuple[str, tuple[str, ...]], float]:
    metrics = Metrics(Health())
    metrics.add(Exposition(profiles))
    return {
        (each.name, tuple(each.labels.values())): each.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for each in family.samples
        if each.name.startswith(("edged_profile", "edged_probe"))
    }


async def test_before_the_first_second_nothing_is_told() -> None:
    assert exposed(Profiles(Device(id="pi", software="1", cores={}))) == {}


async def test_amounts_count_since_the_start_and_states_are_of_the_last_ten_seconds() -> None:
    profiles = Profiles(Device(id="pi", software="1", cores={}))
    for number in range(30):
        waits = histogram(b3=10) if number < 15 else histogram(b20=10)
        chat = process(cpu_seconds={1: 0.5}, run_queue=waits, written_bytes=100)
        profiles.add(sample(chat, at=NOW + number, step=Step.COUNTERS), [], Warmth())
    found = exposed(profiles)
    assert found["edged_profile_cpu_seconds_total", ("1", "chat")] == 15.0
    assert found["edged_profile_written_bytes_total", ("chat",)] == 3000
    assert found["edged_profile_run_queue_waits_total", ("chat",)] == 300
    assert found["edged_profile_run_queue_p99_seconds", ("chat",)] > 1.0
    assert ("edged_profile_io_p99_seconds", ("chat",)) not in found
    assert found["edged_probe_step", ("counters",)] == 1.0
    assert found["edged_probe_step", ("ebpf",)] == 0.0
    assert 0 < found["edged_profile_score", ()] < 1
