"""The profile for Prometheus: amounts since the start as counters, the last ten seconds as gauges."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from edged.probe.profile import Profile, WorkerProfile
from edged.probe.profiles import Profiles
from edged.probe.sample import Step

COUNTERS: Mapping[str, tuple[str, str]] = {
    "run_queue_waits": ("Waits of threads for a core", "run_queue"),
    "migrations": ("Moves of threads to another core", "migrations"),
    "affinity_changes": ("Calls of sched_setaffinity on a worker's threads", "affinity_changes"),
    "read_bytes": ("Bytes read from block devices", "read_bytes"),
    "written_bytes": ("Bytes written to block devices", "written_bytes"),
    "io_requests": ("Requests to block devices", "io_delay"),
    "tokens": ("Tokens generated", "completion_tokens"),
    "joules": ("Energy by share of the CPU time", "joules"),
}
GAUGES: Mapping[str, tuple[str, Callable[[WorkerProfile], float | None]]] = {
    "run_queue_p99_seconds": (
        "Wait for a core that one in a hundred exceeds, over ten seconds",
        lambda worker: _p99(worker, "run_queue"),
    ),
    "io_p99_seconds": (
        "Time of a block request that one in a hundred exceeds, over ten seconds",
        lambda worker: _p99(worker, "io_delay"),
    ),
    "throttled_share": ("Share of CPU quota periods in which it was stopped", lambda w: _value(w, "throttled_share")),
    "file_bytes": ("Memory in RAM that belongs to files", lambda worker: _value(worker, "file_bytes")),
    "anonymous_bytes": ("Memory in RAM of its own", lambda worker: _value(worker, "anonymous_bytes")),
    "tokens_per_second": ("Tokens generated a second, over ten seconds", lambda w: _value(w, "tokens_per_second")),
}


class Exposition(Collector):
    """Read when asked for; nothing before the first second."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles

    def collect(self) -> Iterator[Metric]:
        total = self._profiles.total
        if total is None:
            return
        recent = self._profiles.window("10s")
        yield _cpu_seconds(total)
        for name, (documentation, field) in COUNTERS.items():
            yield _counter(total, name, documentation, field)
        for name, (documentation, read) in GAUGES.items():
            gauge = GaugeMetricFamily(f"edged_profile_{name}", documentation, labels=["worker"])
            for worker, found in recent.workers.items():
                if (value := read(found)) is not None:
                    gauge.add_metric([worker], value)
            yield gauge
        yield GaugeMetricFamily("edged_profile_score", "Room for work, 0 to 1", value=recent.score.value)
        yield CounterMetricFamily("edged_probe_cpu_seconds", "CPU time of measuring", value=total.probe.cpu_seconds)
        yield CounterMetricFamily(
            "edged_probe_kernel_seconds",
            "CPU time of its programs in the kernel",
            value=total.probe.kernel_seconds or 0.0,
        )
        yield GaugeMetricFamily(
            "edged_probe_resident_bytes", "Memory of what measures", value=total.probe.resident_bytes
        )
        yield _step(recent.step)


def _cpu_seconds(total: Profile) -> Metric:
    used = CounterMetricFamily("edged_profile_cpu_seconds", "CPU time by core", labels=["worker", "core"])
    for name, worker in total.workers.items():
        for core, seconds in worker.cpu_seconds.value.items() if worker.cpu_seconds is not None else ():
            used.add_metric([name, str(core)], seconds)
    return used


def _counter(total: Profile, name: str, documentation: str, field: str) -> Metric:
    counter = CounterMetricFamily(f"edged_profile_{name}", documentation, labels=["worker"])
    for worker, found in total.workers.items():
        figure = getattr(found, field)
        if figure is not None:
            value = figure.value
            counter.add_metric([worker], value if isinstance(value, int | float) else sum(value.counts))
    return counter


def _step(step: Step) -> Metric:
    gauge = GaugeMetricFamily("edged_probe_step", "1 for the means of measurement in use", labels=["step"])
    for each in Step:
        gauge.add_metric([each.value], float(each is step))
    return gauge


def _value(worker: WorkerProfile, field: str) -> float | None:
    figure = getattr(worker, field)
    return None if figure is None else figure.value


def _p99(worker: WorkerProfile, field: str) -> float | None:
    figure = getattr(worker, field)
    return None if figure is None or figure.value.p99_us is None else figure.value.p99_us / 1e6
