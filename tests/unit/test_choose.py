"""Three devices as their profiles were recorded, and which of them should take a request."""

from pathlib import Path

import msgspec
import pytest

from edged.probe.choose import STALE_AFTER_SECONDS, Need, choose, expected_seconds
from edged.probe.profile import Figure, Profile, from_json
from edged.probe.sample import Source

DATA = Path(__file__).parents[1] / "data" / "profiles"
NAMES = ("pi5", "rk3588", "n150")
NOW = 1_767_225_600.0
ASKED = Need(model="smollm2-135m-instruct", memory_bytes=600_000_000, prompt_tokens=300, completion_tokens=60)


@pytest.fixture
def recorded() -> dict[str, Profile]:
    """``pi5`` serves the model, busy and hot; ``rk3588`` serves it at ease; ``n150`` serves another, with much free."""
    return {name: from_json((DATA / f"{name}.json").read_bytes()) for name in NAMES}


def need(**changes: object) -> Need:
    return msgspec.structs.replace(ASKED, **changes)


def test_of_two_that_serve_the_model_the_one_with_more_room_is_chosen(recorded: dict[str, Profile]) -> None:
    choice = choose(ASKED, list(recorded.values()), now=NOW)
    assert choice.device == "rk3588"
    assert [each.device for each in choice.judgements] == ["rk3588", "pi5", "n150"]
    assert choice.reason.startswith("serves smollm2-135m-instruct, about")


def test_the_order_in_which_profiles_come_changes_nothing(recorded: dict[str, Profile]) -> None:
    given = list(recorded.values())
    assert choose(ASKED, given, now=NOW) == choose(ASKED, given[::-1], now=NOW)


def test_a_model_that_is_served_nowhere_goes_where_the_memory_is(recorded: dict[str, Profile]) -> None:
    choice = choose(need(model="qwen2.5-1.5b", memory_bytes=4_000_000_000), list(recorded.values()), now=NOW)
    assert choice.device == "n150"
    assert "has the memory to load qwen2.5-1.5b" in choice.reason
    against = {each.device: each.against for each in choice.judgements if each.against}
    assert set(against) == {"pi5", "rk3588"}
    assert all("free of the 4000 MB needed" in text for text in against.values())


def test_a_deadline_rules_out_who_is_too_slow(recorded: dict[str, Profile]) -> None:
    del recorded["rk3588"]
    profiles = list(recorded.values())
    slow = next(each for each in choose(ASKED, profiles, now=NOW).judgements if each.device == "pi5")
    assert slow.seconds is not None
    choice = choose(need(deadline_seconds=slow.seconds * 0.5), profiles, now=NOW)
    assert choice.device == "n150"  # how fast it would be is not known, and nothing speaks against it
    assert "it would take" in choice.judgements[-1].against


def test_who_is_known_to_meet_a_deadline_goes_before_who_may(recorded: dict[str, Profile]) -> None:
    unknown = recorded["rk3588"]
    chat = msgspec.structs.replace(unknown.workers["chat"], decode_speed=None)
    recorded["rk3588"] = msgspec.structs.replace(unknown, workers={"chat": chat})
    assert choose(need(deadline_seconds=60.0), list(recorded.values()), now=NOW).device == "pi5"
    assert choose(ASKED, list(recorded.values()), now=NOW).device == "rk3588"


def test_a_device_that_heat_slows_goes_after_one_that_is_cool(recorded: dict[str, Profile]) -> None:
    best = recorded["rk3588"]
    recorded["rk3588"] = msgspec.structs.replace(best, node=msgspec.structs.replace(best.node, slowed=True))
    assert choose(ASKED, list(recorded.values()), now=NOW).device == "pi5"


def test_a_device_that_was_not_heard_of_is_left_out(recorded: dict[str, Profile]) -> None:
    best = recorded["rk3588"]
    recorded["rk3588"] = msgspec.structs.replace(best, at=NOW - STALE_AFTER_SECONDS - 1)
    choice = choose(ASKED, list(recorded.values()), now=NOW)
    assert choice.device == "pi5"
    assert choice.judgements[-1].against == "nothing was heard of it for 181 s"


def test_when_no_device_can_all_reasons_are_told(recorded: dict[str, Profile]) -> None:
    choice = choose(need(model="llama-70b", memory_bytes=10**12), list(recorded.values()), now=NOW)
    assert choice.device is None
    assert all(name in choice.reason for name in NAMES)


def test_without_any_profile_there_is_no_device() -> None:
    assert choose(ASKED, [], now=NOW).reason == "there is no profile"


def test_an_answer_takes_its_wait_its_prompt_and_its_tokens(recorded: dict[str, Profile]) -> None:
    def told(value: float) -> Figure[float]:
        return Figure(value, 60.0, (Source.WORKER,), 1.0)

    worker = msgspec.structs.replace(
        recorded["pi5"].workers["chat"],
        requests=Figure(4, 60.0, (Source.WORKER,), 1.0),
        queue_seconds=told(2.0),
        prompt_speed=told(300.0),
        decode_speed=told(20.0),
    )
    assert expected_seconds(ASKED, worker) == pytest.approx(0.5 + 1.0 + 3.0)
    assert expected_seconds(need(prompt_tokens=0, completion_tokens=0), worker) == pytest.approx(0.5)
