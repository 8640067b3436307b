"""What is marked as changing without a restart reaches those who use it, by the reload alone."""

from collections.abc import Sequence
from typing import Any, cast

import pytest

from edged import daemon, log
from edged.config import LIVE, Config, Events, load, settings
from edged.events.admission import Admission
from edged.events.retention import Retention
from edged.events.trigger import TopicRule
from edged.gateway.mqtt import MqttGateway
from edged.rag.answer import Answerer, Settings

CHANGED: dict[str, Any] = {
    "events.topics": [{"filter": "plant/{device}/+", "question": "Why {value}?"}],
    "events.max_pending": 7,
    "events.keep_days": 1.5,
    "events.keep_bytes": 7,
    "rag.passages": 7,
    "rag.budget_tokens": 77,
    "rag.max_tokens": 7,
    "rag.near": 0.7,
    "log.level": "error",
}


class Users:
    """All who are told of a reload; ``told`` is what each now works by."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def use(self, what: Settings | Events, *, near: float | None = None) -> None:
        kept = (what.keep_days, what.keep_bytes) if isinstance(what, Events) else what
        self.told += [kept, near]

    def use_limit(self, limit: int) -> None:
        self.told.append(limit)

    def use_rules(self, rules: Sequence[TopicRule]) -> None:
        self.told.append(list(rules))

    def configure(self, level: str) -> None:
        self.told.append(level)


def told(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    users = Users()
    monkeypatch.setattr(log, "configure", users.configure)
    nobody: Any = users
    answerer, admission = cast(Answerer, nobody), cast(Admission, nobody)
    mqtt, retention = cast(MqttGateway, nobody), cast(Retention, nobody)
    daemon._use_live_settings(answerer, admission, mqtt, retention, "box", config)
    return users.told


@pytest.mark.parametrize("name", [name for name, field in settings() if field.json_schema_extra == LIVE])
def test_a_live_setting_reaches_who_uses_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (told(load(None, {}, changes), monkeypatch) for changes in ({}, {name: CHANGED[name]}))
    assert len([pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]) == 1


def test_a_devices_name_stays_that_of_the_start_until_the_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"events.topics": CHANGED["events.topics"], "probe.device": "renamed"}
    (rules,) = [each for each in told(load(None, {}, changes), monkeypatch) if isinstance(each, list)]
    assert rules[0].filter == "plant/box/+"
