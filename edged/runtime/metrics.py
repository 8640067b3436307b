"""The daemon's counters for Prometheus. Every metric is declared here, with what it counts, but those of the profile,
which :mod:`edged.probe.exposition` has."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from edged.hardware.usage import Usage
from edged.runtime.health import KINDS, Health
from edged.types import Answer

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One registry a daemon; :meth:`render` is what ``/metrics`` serves."""

    def __init__(self, health: Health) -> None:
        self.registry = CollectorRegistry()
        self._health = health
        self.events_accepted = Counter(
            "edged_events_accepted",
            "Events written durably, by status: new, open, closed, rejected",
            ["status"],
            registry=self.registry,
        )
        self.events_closed = Counter(
            "edged_events_closed", "Events that got their outcome", ["outcome"], registry=self.registry
        )
        self.event_seconds = Histogram(
            "edged_event_seconds", "From receipt to outcome, seconds", buckets=SECONDS, registry=self.registry
        )
        self.answers = Counter("edged_answers", "Answers by the step they took", ["step"], registry=self.registry)
        self.first_token_seconds = Histogram(
            "edged_first_token_seconds",
            "From question to first token, seconds",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.answer_seconds = Histogram(
            "edged_answer_seconds", "From question to finished answer, seconds", buckets=SECONDS, registry=self.registry
        )
        self.prompt_tokens = Counter("edged_prompt_tokens", "Tokens of prompts decoded", registry=self.registry)
        self.completion_tokens = Counter("edged_completion_tokens", "Tokens generated", registry=self.registry)
        self._rollouts = Counter(
            "edged_rollouts", "Rollouts of models, by role and outcome", ["role", "outcome"], registry=self.registry
        )
        self._conditions = Gauge(
            "edged_condition", "1 while the named condition of /health holds", ["code"], registry=self.registry
        )

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when asked for."""
        Gauge(name, documentation, registry=self.registry).set_function(read)

    def watch_workers(self, read: Callable[[], Mapping[str, Usage]]) -> None:
        """Add what the worker processes use, read when asked for: by name, those alone that run."""
        self.registry.register(_WorkerUsage(read))

    def add(self, collector: Collector) -> None:
        """Add metrics that are made when asked for."""
        self.registry.register(collector)

    def answered(self, answer: Answer) -> None:
        """Count one finished answer."""
        self.answers.labels(answer.step).inc()
        self.answer_seconds.observe(answer.timings.total_ms / 1e3)
        if answer.timings.first_token_ms is not None:
            self.first_token_seconds.observe(answer.timings.first_token_ms / 1e3)
        self.prompt_tokens.inc(answer.prompt_tokens)
        self.completion_tokens.inc(answer.completion_tokens)

    def rollout_ended(self, role: str, outcome: str) -> None:
        """Count one rollout of a model."""
        self._rollouts.labels(role, outcome).inc()

    def render(self) -> bytes:
        """Everything in the Prometheus text format."""
        for kind in KINDS:
            self._conditions.labels(kind.code).set(1.0 if self._health.holds(kind) else 0.0)
        return generate_latest(self.registry)


class _WorkerUsage(Collector):
    """Counts start anew with each process, as Prometheus expects of counters."""

    def __init__(self, read: Callable[[], Mapping[str, Usage]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        resident = GaugeMetricFamily(
            "edged_worker_resident_bytes", "Memory of a worker process in RAM", labels=["worker"]
        )
        faults = CounterMetricFamily(
            "edged_worker_page_faults",
            "Page faults of a worker process; major ones waited for the disk",
            labels=["worker", "kind"],
        )
        for worker, usage in self._read().items():
            resident.add_metric([worker], usage.resident_bytes)
            faults.add_metric([worker, "minor"], usage.minor_faults)
            faults.add_metric([worker, "major"], usage.major_faults)
        yield resident
        yield faults
