"""Where samples come from: a probe on a real socket, and this process while there is none."""

import asyncio
import contextlib
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from edged.probe import feed as feeding
from edged.probe.feed import Feed, Link, Pauses
from edged.probe.protocol import Watch, encode
from edged.probe.sample import Sample, Step, Watched
from edged.probe.sampler import Sampler
from edged.runtime.health import Health
from edged.runtime.supervise import Supervisor
from tests.fake_probe import FakeProbe
from tests.samples import process, sample

QUICK = Pauses(silent=0.3, smallest=0.02, largest=0.05)
CHAT, EMBED = Watched(name="chat", pid=10), Watched(name="embed", pid=11)


class StandIn(Sampler):
    """Measures nothing, at once; says who used it."""

    def __init__(self) -> None:
        self.threads = {threading.current_thread().name}
        self.watched: Sequence[Watched] = ()
        self.closed = threading.Event()

    def watch(self, processes: Sequence[Watched]) -> None:
        self.threads.add(threading.current_thread().name)
        self.watched = processes

    def sample(self, now: float) -> Sample:
        self.threads.add(threading.current_thread().name)
        found = [process(each.name, each.pid) for each in self.watched]
        return sample(*found, at=now, step=Step.COUNTERS, reason="no counters in the processor")

    def close(self) -> None:
        self.closed.set()


class Rig:
    """A feed, its probe, and what came of both."""

    def __init__(self, folder: Path) -> None:
        self.probe = FakeProbe(folder / "probe.sock")
        self.health = Health()
        self.watched = [CHAT]
        self.samples: asyncio.Queue[Sample] = asyncio.Queue()
        self.stand_ins: list[StandIn] = []
        self.feed = Feed(
            folder / "probe.sock",
            lambda: self.watched,
            self.samples.put_nowait,
            self.health,
            stand_in=self._stand_in,
            pauses=QUICK,
        )

    def _stand_in(self) -> StandIn:
        self.stand_ins.append(StandIn())
        return self.stand_ins[-1]

    async def next(self, step: Step) -> Sample:
        """The next sample that was made by these means."""
        while (found := await self.samples.get()).step is not step:
            pass
        return found

    @property
    def told(self) -> dict[str, str]:
        return {held.code: held.text for held in self.health.conditions()}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    supervisor = Supervisor(Health())
    supervisor.start("link", made.feed.follow)
    supervisor.start("stand-in", made.feed.stand_in)
    yield made
    await supervisor.stop_all()
    await made.probe.stop()
    for thread in threading.enumerate():
        if thread.name.startswith("probe-stand-in"):
            await asyncio.to_thread(thread.join, 10)  # stopping in haste, nobody waits for its last deed
            assert not thread.is_alive()
    assert all(each.closed.is_set() for each in made.stand_ins)


async def linked(rig: Rig) -> None:
    rig.probe.answer = encode(sample(process()))
    await rig.probe.start()
    await rig.next(Step.EBPF)


async def test_the_probe_is_told_what_to_watch_and_its_samples_are_handed_on(rig: Rig) -> None:
    rig.probe.answer = encode(sample(process(minor_faults=7)))
    await rig.probe.start()
    assert await rig.probe.watches.get() == (CHAT,)
    assert await rig.next(Step.EBPF) == sample(process(minor_faults=7))
    assert (rig.feed.link, rig.told) == (Link.HEARD, {})


async def test_the_probe_is_told_again_only_when_the_processes_have_changed(rig: Rig) -> None:
    await linked(rig)
    assert await rig.probe.watches.get() == (CHAT,)
    for _ in range(3):
        rig.probe.send(sample(process()))
        await rig.next(Step.EBPF)
    assert rig.probe.watches.empty()
    rig.watched = [CHAT, EMBED]
    rig.probe.send(sample(process()))
    assert await rig.probe.watches.get() == (CHAT, EMBED)


async def test_without_a_probe_this_process_measures_on_one_thread_of_its_own_and_says_so(rig: Rig) -> None:
    found = await rig.next(Step.COUNTERS)
    assert [each.name for each in found.processes] == ["chat"]
    assert found.reason.startswith("no probe answers at ")
    assert found.reason.endswith("; no counters in the processor")
    assert rig.told == {"probe_absent": f"measured by counters: {found.reason}"}
    assert rig.health.status() == "ok"
    (stand_in,) = rig.stand_ins
    assert stand_in.threads == {"probe-stand-in_0"}


async def test_when_the_probe_comes_it_measures_and_when_it_dies_this_process_does_again(rig: Rig) -> None:
    await rig.next(Step.COUNTERS)
    await linked(rig)
    assert (rig.feed.link, rig.told) == (Link.HEARD, {})
    (first,) = rig.stand_ins
    assert await asyncio.to_thread(first.closed.wait, 10)
    await rig.probe.stop()
    await rig.next(Step.COUNTERS)
    assert set(rig.told) == {"probe_absent"}
    assert [each.closed.is_set() for each in rig.stand_ins] == [True, False]
    await linked(rig)
    assert rig.told == {}


async def test_a_probe_that_measures_by_lesser_means_is_named(rig: Rig) -> None:
    rig.probe.answer = encode(sample(process(), step=Step.PROCFS, reason="no kernel headers"))
    await rig.probe.start()
    await rig.next(Step.PROCFS)
    assert rig.told == {"probe_reduced": "measured by procfs: no kernel headers"}
    rig.probe.send(sample(process()))
    await rig.next(Step.EBPF)
    assert rig.told == {}


async def test_a_probe_that_falls_silent_is_replaced_until_it_speaks_again(rig: Rig) -> None:
    await linked(rig)
    rig.probe.answer = b""
    assert (await rig.next(Step.COUNTERS)).reason.startswith("the probe said nothing for 0.3 s")
    rig.probe.answer = encode(sample(process()))
    await rig.next(Step.EBPF)
    assert rig.told == {}


NEWER = msgspec.msgpack.encode({"version": 99, "anything": 1})
GARBAGE = {
    "no message": (struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1", "not a message of this protocol"),
    "another message": (encode(Watch((CHAT,))), "not a message of this protocol"),
    "too long a frame": (struct.pack("<I", 2**32 - 1), "exceeds the limit"),
    "another version": (struct.pack("<I", len(NEWER)) + NEWER, "version 99"),
}


@pytest.mark.parametrize("said", GARBAGE)
async def test_a_probe_that_says_what_cannot_be_read_is_left(rig: Rig, said: str) -> None:
    rig.probe.answer, reason = GARBAGE[said]
    await rig.probe.start()
    assert reason in (await rig.next(Step.COUNTERS)).reason


async def test_who_is_neither_root_nor_the_owner_of_the_folder_is_not_believed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "_peer_user", lambda _connection: 4242)
    rig.probe.answer = encode(sample(process()))
    await rig.probe.start()
    assert (await rig.next(Step.COUNTERS)).reason.startswith("user 4242 listens at ")
    assert rig.probe.watches.empty()


async def test_a_stand_in_that_fails_is_made_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    failures = [OSError("perf is not permitted")]

    def failing() -> StandIn:
        if failures:
            raise failures.pop()
        return rig._stand_in()

    feed = Feed(tmp_path / "none", lambda: [CHAT], rig.samples.put_nowait, rig.health, stand_in=failing, pauses=QUICK)
    supervisor = Supervisor(Health())
    supervisor.start("link", feed.follow)
    supervisor.start("stand-in", feed.stand_in)
    await rig.next(Step.COUNTERS)
    with contextlib.suppress(asyncio.CancelledError):
        await supervisor.stop_all()
    assert [each.closed.is_set() for each in rig.stand_ins] == [True]
