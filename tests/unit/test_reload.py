"""A reload is new or old, and says which."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from edged.config import Config, differences, load
from edged.errors import ConfigError
from edged.reload import Reloader
from edged.runtime.health import CONFIG_REFUSED, RESTART_NEEDED, Health
from edged.runtime.notify import Notifier


def configured(**names: Any) -> Config:
    return load(None, {}, {name.replace("__", "."): value for name, value in names.items()})


class Manager(Notifier):
    """Knows when a reload has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.ended = asyncio.Event()

    def reloading(self) -> None:
        self.told.append("reloading")

    def ready(self) -> None:
        self.told.append("ready")
        self.ended.set()


class Rig:
    """A reloader that runs, the file it reads, and who uses what it says."""

    def __init__(self, started_with: Config) -> None:
        self.read: Callable[[], Config] = lambda: started_with
        self.manager = Manager()
        self.health = Health()
        self.used: list[Config] = []
        self.reloader = Reloader(started_with, self._read, self.manager)
        self.reloader.on_change(self.used.append)
        self._task = asyncio.create_task(self.reloader.run(self.health))

    def _read(self) -> Config:
        return self.read()

    async def reload(self, read: Callable[[], Config]) -> None:
        self.read = read
        self.manager.ended.clear()
        self.reloader.request()
        await asyncio.wait_for(self.manager.ended.wait(), 10)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
async def rig() -> Any:
    rig = Rig(configured())
    yield rig
    await rig.stop()


def refuse() -> Config:
    raise ConfigError("[rag] near = 7: it is too large")


async def test_live_settings_are_handed_on_and_the_manager_is_told(rig: Rig) -> None:
    new = configured(rag__near=0.5)
    await rig.reload(lambda: new)
    assert rig.used == [new]
    assert rig.reloader.config is new
    assert rig.manager.told == ["reloading", "ready"]
    assert not rig.health.conditions()


async def test_a_file_that_is_wrong_leaves_the_old_in_force_and_is_named_until_it_is_right(rig: Rig) -> None:
    before = rig.reloader.config
    await rig.reload(refuse)
    assert rig.used == []
    assert rig.reloader.config is before
    assert [held.text for held in rig.health.conditions()] == ["[rag] near = 7: it is too large"]
    await rig.reload(lambda: before)
    assert not rig.health.holds(CONFIG_REFUSED)


async def test_settings_that_wait_for_a_restart_are_named_until_they_are_as_at_the_start(rig: Rig) -> None:
    await rig.reload(lambda: configured(chat__threads=3, rag__near=0.5))
    assert [held.code for held in rig.health.conditions()] == [RESTART_NEEDED.code]
    assert "chat.threads" in rig.health.conditions()[0].text
    assert "rag.near" not in rig.health.conditions()[0].text
    await rig.reload(lambda: configured(rag__near=0.5))
    assert not rig.health.conditions()


async def test_the_log_names_what_is_used_and_what_waits_each_time(rig: Rig) -> None:
    for _ in range(2):
        with structlog.testing.capture_logs() as lines:
            await rig.reload(lambda: configured(chat__threads=3, rag__near=0.5, http__listen="127.0.0.1:1"))
        (said,) = [line for line in lines if line["event"] == "reloaded"]
        assert said["restart_needed"] == ["http.listen", "chat.threads"]


async def test_the_same_configuration_again_changes_nothing(rig: Rig) -> None:
    await rig.reload(configured)
    assert rig.used == []


def test_a_setting_of_a_topic_is_a_change_of_the_topics() -> None:
    topic = {"filter": "a", "question": "why?"}
    assert differences(configured(), configured(events__topics=[topic])) == [("events.topics", True)]
    assert differences(configured(), configured(http__listen="127.0.0.1:1")) == [("http.listen", False)]
