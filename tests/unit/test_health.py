"""The registry of named conditions."""

import itertools

import pytest

from edged.runtime import health as conditions
from edged.runtime.health import KINDS, ConditionKind, Health, Severity


@pytest.fixture
def health() -> Health:
    ticks = itertools.count(100.0)
    return Health(clock=lambda: next(ticks))


def test_without_conditions_the_status_is_ok(health: Health) -> None:
    assert health.status() == "ok"
    assert health.conditions() == ()


def test_the_status_is_the_worst_severity_that_holds(health: Health) -> None:
    health.set(conditions.MQTT_DOWN, "refused")
    assert health.status() == "degraded"
    health.set(conditions.STORE_FAILING, "disk full")
    assert health.status() == "failing"
    health.clear(conditions.STORE_FAILING)
    assert health.status() == "degraded"
    health.clear(conditions.MQTT_DOWN)
    assert health.status() == "ok"


def test_what_is_only_told_leaves_the_status_ok_and_comes_last(health: Health) -> None:
    health.set(conditions.PROBE_ABSENT, "measured by counters")
    assert health.status() == "ok"
    health.set(conditions.MQTT_DOWN, "refused")
    assert [held.code for held in health.conditions()] == ["mqtt_disconnected", "probe_absent"]


def test_a_condition_carries_what_to_do_and_since_when_it_holds(health: Health) -> None:
    health.set(conditions.CHAT_DOWN, "killed")
    (held,) = health.conditions()
    assert (held.code, held.text, held.hint) == ("chat_worker_down", "killed", conditions.CHAT_DOWN.hint)
    assert (held.severity, held.since) == (Severity.DEGRADED, 100.0)


def test_a_new_text_keeps_the_time_of_the_first_setting(health: Health) -> None:
    health.set(conditions.CHAT_DOWN, "killed")
    health.set(conditions.EMBED_DOWN, "killed")
    health.set(conditions.CHAT_DOWN, "killed again")
    assert [(held.text, held.since) for held in health.conditions()] == [("killed again", 100.0), ("killed", 101.0)]


def test_cleared_and_set_again_it_holds_since_the_second_time(health: Health) -> None:
    health.set(conditions.CHAT_DOWN, "killed")
    health.clear(conditions.CHAT_DOWN)
    health.set(conditions.CHAT_DOWN, "killed")
    assert health.conditions()[0].since == 101.0


def test_the_worst_comes_first_and_then_the_oldest(health: Health) -> None:
    for kind in (conditions.MQTT_DOWN, conditions.STOPPING, conditions.CHAT_DOWN, conditions.STARTING):
        health.set(kind, "so")
    expected = [conditions.STOPPING, conditions.STARTING, conditions.MQTT_DOWN, conditions.CHAT_DOWN]
    assert [held.code for held in health.conditions()] == [kind.code for kind in expected]


def test_listeners_hear_of_changes_and_of_nothing_else(health: Health) -> None:
    heard: list[str] = []
    health.subscribe(lambda: heard.append(health.status()))
    health.clear(conditions.MQTT_DOWN)
    health.set(conditions.MQTT_DOWN, "refused")
    health.set(conditions.MQTT_DOWN, "refused")
    health.set(conditions.MQTT_DOWN, "unknown host")
    health.clear(conditions.MQTT_DOWN)
    health.clear(conditions.MQTT_DOWN)
    assert heard == ["degraded", "degraded", "ok"]


def test_every_kind_is_in_the_table_once_and_says_what_to_do() -> None:
    declared = {value for value in vars(conditions).values() if isinstance(value, ConditionKind)}
    assert declared == set(KINDS)
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    assert all(kind.hint for kind in KINDS)
