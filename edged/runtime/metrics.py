"""The daemon's counters for Prometheus. Every metric is declared here, with what it counts."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
        self._conditions = Gauge(
            "edged_condition", "1 while the named condition of /health holds", ["code"], registry=self.registry
        )

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when asked for."""
        Gauge(name, documentation, registry=self.registry).set_function(read)

    def answered(self, answer: Answer) -> None:
        """Count one finished answer."""
        self.answers.labels(answer.step).inc()
        self.answer_seconds.observe(answer.timings.total_ms / 1e3)
        if answer.timings.first_token_ms is not None:
            self.first_token_seconds.observe(answer.timings.first_token_ms / 1e3)
        self.prompt_tokens.inc(answer.prompt_tokens)
        self.completion_tokens.inc(answer.completion_tokens)

    def render(self) -> bytes:
        """Everything in the Prometheus text format."""
        for kind in KINDS:
            self._conditions.labels(kind.code).set(1.0 if self._health.holds(kind) else 0.0)
        return generate_latest(self.registry)
