"""When a profile is published: on schedule, and sooner for a reason."""

from typing import Any

import msgspec
import pytest

from edged.probe.profile import Device, Profile, Warmth, from_json, profile
from edged.probe.profiles import Profiles
from edged.probe.publish import LEAST_SECONDS, Published, Publisher, due, notable
from edged.probe.sample import Step
from tests.samples import NOW, counted, process, sample

DEVICE = Device(id="pi", software="1", cores={0: 1.0})
EVERY = 60.0


def told(*names: str, **changes: Any) -> Profile:
    return profile(sample(*(process(name) for name in names or ("chat",)), **changes), DEVICE, {}, Warmth())


USUAL = told()


def with_score(value: float) -> Profile:
    return msgspec.structs.replace(USUAL, score=msgspec.structs.replace(USUAL.score, value=value))


def test_the_first_profile_is_published_at_once_and_the_next_on_schedule() -> None:
    assert due(None, USUAL, NOW, EVERY)
    assert not due(Published(USUAL, NOW), USUAL, NOW + 59.0, EVERY)
    assert due(Published(USUAL, NOW), USUAL, NOW + 60.0, EVERY)


def test_a_notable_change_is_published_sooner_but_not_at_once_again() -> None:
    other = told(step=Step.PROCFS)
    assert not due(Published(USUAL, NOW), other, NOW + LEAST_SECONDS - 1, EVERY)
    assert due(Published(USUAL, NOW), other, NOW + LEAST_SECONDS, EVERY)


@pytest.mark.parametrize(
    "other",
    [
        told(step=Step.COUNTERS),
        told("chat", "embed"),
        profile(sample(process()), DEVICE, {}, Warmth(slowed=True)),
        profile(sample(process(throttled_share=counted(0.3))), DEVICE, {}, Warmth()),
        with_score(USUAL.score.value + 0.2),
    ],
)
def test_what_places_work_elsewhere_is_notable(other: Profile) -> None:
    assert notable(USUAL, other)


def test_small_changes_are_not_notable() -> None:
    assert not notable(USUAL, with_score(USUAL.score.value + 0.1))
    assert not notable(USUAL, profile(sample(process(throttled_share=counted(0.05))), DEVICE, {}, Warmth()))


async def test_a_minute_is_published_on_schedule_and_ten_seconds_on_a_change() -> None:
    published: list[Profile] = []
    profiles = Profiles(DEVICE)
    publisher = Publisher(profiles, lambda body: published.append(from_json(body)), EVERY)
    for number in range(100):
        step = Step.EBPF if number < 75 else Step.PROCFS
        profiles.add(sample(process(), at=NOW + number, step=step), [], Warmth())
        publisher.observe(NOW + number)
    assert [round(each.at - NOW) for each in published] == [0, 60, 75]
    assert [round(each.seconds) for each in published] == [1, 61, 10]
