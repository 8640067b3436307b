"""A service that ends by an error is started again, and /health names it and the cause until it runs on."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import structlog

from edged.runtime import supervise
from edged.runtime.health import SERVICE_FAILING, Health
from edged.runtime.supervise import Supervisor


def told(health: Health) -> str | None:
    return next((held.text for held in health.conditions() if held.code == SERVICE_FAILING.code), None)


def failing(name: str, times: int, then: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    async def service() -> None:
        nonlocal times
        if times:
            times -= 1
            raise ValueError(f"{name} is broken")
        await then()

    return service


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "SMALLEST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(supervise, "LARGEST_PAUSE_SECONDS", 0.002)


async def test_a_service_that_raises_is_named_with_the_cause_until_it_has_run_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervise, "STABLE_AFTER_SECONDS", 0.05)
    health, running, changed = Health(), asyncio.Event(), asyncio.Event()
    health.subscribe(changed.set)
    supervisor = Supervisor(health)

    async def serve() -> None:
        running.set()
        await asyncio.Event().wait()

    supervisor.start("mqtt", failing("the filter", 3, serve))
    await running.wait()
    assert told(health) == "mqtt: ValueError: the filter is broken"
    changed.clear()
    await changed.wait()
    assert told(health) is None
    await supervisor.stop_all()


async def test_one_failure_is_only_logged() -> None:
    health, ended = Health(), asyncio.Event()
    supervisor = Supervisor(health)

    async def end() -> None:
        ended.set()

    with structlog.testing.capture_logs() as lines:
        supervisor.start("once", failing("it", 1, end))
        await ended.wait()
    assert told(health) is None
    assert [(line["event"], line["service"]) for line in lines] == [("service_failed", "once")]


async def test_of_two_that_fail_the_one_that_recovers_leaves_the_other_named() -> None:
    health, ended = Health(), asyncio.Event()
    supervisor = Supervisor(health)

    async def end() -> None:
        ended.set()

    supervisor.start("bad", failing("it", 10**9, end))
    supervisor.start("good", failing("that", 5, end))
    await ended.wait()
    assert told(health) == "bad: ValueError: it is broken"
    await supervisor.stop_all()
