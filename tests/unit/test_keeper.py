"""Cores that go and come while it runs, and cores that others are to keep off, are looked at again and again."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.hardware import reserve
from edged.hardware.placement import Machine, Wishes
from edged.runtime.health import Health
from edged.serving.keeper import Keeper
from tests.sysfs import write

CORES = tuple(sorted(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def _affinity() -> Iterator[None]:
    """The keeper moves this process."""
    yield
    os.sched_setaffinity(0, CORES)


@pytest.mark.skipif(CORES[:2] != (0, 1), reason="cores 0 and 1 are needed")
async def test_cores_that_go_offline_cost_threads_until_they_are_back(tmp_path: Path) -> None:
    write(tmp_path, {"online": "0-1"})
    keeper = Keeper(Machine.of(2), Wishes(), Health(), None, sysfs_cpu=tmp_path)
    await keeper.begin()
    found = []
    for online in ("0", "0-1"):
        write(tmp_path, {"online": online})
        await asyncio.to_thread(keeper.look)
        found.append((keeper.placement.chat.cores, keeper.placement.chat.threads, os.sched_getaffinity(0)))
    await keeper.end()
    assert found == [((0,), 1, {0}), ((0, 1), 2, {0, 1})]


async def test_cores_that_this_process_may_not_use_are_not_taken_when_others_come(tmp_path: Path) -> None:
    write(tmp_path, {"online": f"{CORES[0]},500"})
    core = Machine.of(CORES[0] + 1).cores[-1]
    keeper = Keeper(Machine(cores=(core,)), Wishes(), Health(), None, sysfs_cpu=tmp_path)
    await keeper.begin()
    write(tmp_path, {"online": f"{CORES[0]},500,501"})
    await asyncio.to_thread(keeper.look)
    assert {each.number for each in keeper.machine.cores} == {CORES[0], 501}
    await keeper.end()


def test_cores_that_others_may_use_again_are_no_longer_said_to_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = True
    monkeypatch.setattr(reserve, "is_reserved", lambda _cores: reserved)
    keeper = Keeper(Machine.of(4), Wishes(reserve_cores=True), Health(), None, sysfs_cpu=tmp_path)
    assert keeper.look().unreserved == ""
    reserved = False
    assert keeper.look().unreserved == "services and logins may run on cores 0-2"
