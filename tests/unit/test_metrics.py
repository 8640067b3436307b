"""What Prometheus is told."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edged.hardware.usage import Usage
from edged.runtime import health as conditions
from edged.runtime.health import KINDS, Health
from edged.runtime.metrics import Metrics
from edged.types import Answer, Step, Timings


def answer(step: Step = "generated", first_token_ms: float | None = 40.0) -> Answer:
    return Answer(
        text="Grease it.",
        citations=(),
        step=step,
        note="",
        model="tiny",
        timings=Timings(first_token_ms=first_token_ms, total_ms=300.0),
        prompt_tokens=50,
        completion_tokens=7,
    )


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and labels, read as Prometheus reads them."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def metrics(health: Health) -> Metrics:
    return Metrics(health)


def test_an_answer_is_counted_by_step_with_its_times_and_tokens(metrics: Metrics) -> None:
    metrics.answered(answer())
    metrics.answered(answer("passages", first_token_ms=None))
    found = samples(metrics)
    assert found["edged_answers_total", ("generated",)] == found["edged_answers_total", ("passages",)] == 1
    assert found["edged_answer_seconds_count", ()] == 2
    assert found["edged_answer_seconds_sum", ()] == pytest.approx(0.6)
    assert found["edged_first_token_seconds_count", ()] == 1
    assert found["edged_first_token_seconds_bucket", ("0.05",)] == 1
    assert found["edged_prompt_tokens_total", ()] == 100
    assert found["edged_completion_tokens_total", ()] == 14


def test_every_condition_is_shown_and_follows_the_registry(health: Health, metrics: Metrics) -> None:
    health.set(conditions.MQTT_DOWN, "refused")
    shown = {labels[0]: value for (name, labels), value in samples(metrics).items() if name == "edged_condition"}
    assert shown == {kind.code: float(kind is conditions.MQTT_DOWN) for kind in KINDS}
    health.clear(conditions.MQTT_DOWN)
    assert samples(metrics)["edged_condition", ("mqtt_disconnected",)] == 0


def test_a_watched_gauge_is_read_when_asked_for(metrics: Metrics) -> None:
    values = iter([3.0, 5.0])
    metrics.watch("edged_events_open", "Events without an outcome", lambda: next(values))
    assert [samples(metrics)["edged_events_open", ()] for _ in range(2)] == [3.0, 5.0]


def test_the_memory_and_page_faults_of_running_workers_are_read_when_asked_for(metrics: Metrics) -> None:
    running = {"chat": Usage(resident_bytes=100_000_000, minor_faults=12_049, major_faults=6)}
    metrics.watch_workers(lambda: running)
    found = samples(metrics)
    assert found["edged_worker_resident_bytes", ("chat",)] == 100_000_000
    assert found["edged_worker_page_faults_total", ("minor", "chat")] == 12_049
    assert found["edged_worker_page_faults_total", ("major", "chat")] == 6
    running.clear()
    assert ("edged_worker_resident_bytes", ("chat",)) not in samples(metrics)


def test_two_daemons_in_one_process_count_apart(metrics: Metrics) -> None:
    other = Metrics(Health())
    metrics.answered(answer())
    assert ("edged_answers_total", ("generated",)) not in samples(other)
