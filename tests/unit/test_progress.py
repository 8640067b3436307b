"""What workers served from one second to the next."""

from typing import Any

import pytest

from edged.probe.profile import Speed
from edged.probe.progress import Progress, Subject
from edged.probe.sample import Watched
from edged.types import Served


def chat(model: str = "tiny@1", **served: float) -> Subject:
    return Subject(watched=Watched(name="chat", pid=10), model=model, served=Served(**served))  # type: ignore[arg-type]


DAEMON = Subject(watched=Watched(name="daemon", pid=1))


def test_what_was_served_is_the_difference_of_the_counts() -> None:
    progress, first = Progress().observe([DAEMON, chat(requests=3, completion_tokens=50)])
    _, then = progress.observe([DAEMON, chat(requests=4, completion_tokens=80)])
    assert first["chat"].served == Served(requests=3, completion_tokens=50)
    assert then["chat"].served == Served(requests=1, completion_tokens=30)
    assert "daemon" not in then


def test_speeds_follow_finished_requests_smoothly_and_stay_while_there_are_none() -> None:
    progress, found = Progress().observe([chat(prompt_tokens=120, cached_tokens=20, prefill_seconds=0.5)])
    assert found["chat"].speed == Speed(prompt=200.0, decode=None)
    after: dict[str, Any] = {"prompt_tokens": 120, "cached_tokens": 20, "prefill_seconds": 0.5}
    progress, found = progress.observe([chat(**after, finished_tokens=100, generate_seconds=2.0)])
    assert found["chat"].speed == Speed(prompt=200.0, decode=50.0)
    progress, found = progress.observe([chat(**after, finished_tokens=200, generate_seconds=3.0)])
    assert found["chat"].speed.decode == pytest.approx(50.0 + 0.3 * 50.0)
    _, found = progress.observe([chat(**after, finished_tokens=200, generate_seconds=3.0)])
    assert found["chat"].speed.decode == pytest.approx(65.0)


def test_an_answer_that_still_grows_says_nothing_of_speed() -> None:
    _, found = Progress().observe([chat(completion_tokens=40)])
    assert (found["chat"].served.completion_tokens, found["chat"].speed) == (40, Speed())


def test_another_model_begins_anew() -> None:
    progress, _ = Progress().observe([chat(requests=9, finished_tokens=90, generate_seconds=1.0)])
    _, found = progress.observe([chat("other@2", requests=1)])
    assert found["chat"].served == Served(requests=1)
    assert found["chat"].speed == Speed()


def test_counts_that_began_again_are_taken_as_they_are() -> None:
    progress, _ = Progress().observe([chat(requests=9)])
    assert progress.observe([chat(requests=2)])[1]["chat"].served == Served(requests=2)
