"""A reference for those who place work: which of several devices should take a request, by their profiles. Pure.

A device drops out for a reason. Of those left one that serves the model already goes first, then one that is known to
meet the deadline, then one that heat does not slow, then the one with the highest load score.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from edged.probe.profile import Profile, WorkerProfile, mean_wait_seconds

STALE_AFTER_SECONDS: Final = 180.0
"""Three times as long as a device is silent by default (probe.publish_seconds)."""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """A request: the ``model``'s name or identity, the ``memory_bytes`` it takes where it is not loaded yet, its
    tokens, and within how many seconds it is to be answered."""

    model: str
    memory_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    deadline_seconds: float | None = None


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """One device. ``against`` says why it cannot take the request, else it is empty. ``serves``: the model is loaded
    there; ``seconds``: how long the answer will take, where that can be told; ``slowed`` by heat or power now."""

    device: str
    against: str = ""
    serves: bool = False
    seconds: float | None = None
    slowed: bool = False
    score: float = 0.0


class Choice(msgspec.Struct, frozen=True):
    """The ``device``, None where none can take it, and the reason; ``judgements`` of all, the best first."""

    device: str | None
    reason: str
    judgements: tuple[Judgement, ...]


def choose(need: Need, profiles: Sequence[Profile], *, now: float) -> Choice:
    """Pick a device; ``now`` is seconds since 1970, as the profiles' ``at``."""
    judged = [judge(need, each, now=now) for each in profiles]
    judgements = tuple(sorted(judged, key=lambda each: _rank(each, need)))
    if not judgements or judgements[0].against:
        told = "; ".join(f"{each.device}: {each.against}" for each in judgements)
        return Choice(None, told or "there is no profile", judgements)
    return Choice(judgements[0].device, _praise(judgements[0], need), judgements)


def judge(need: Need, profile: Profile, *, now: float) -> Judgement:
    """What one profile says of the request."""
    worker = _serving(need.model, profile)
    seconds = expected_seconds(need, worker) if worker is not None else None
    return Judgement(
        device=profile.device,
        against=_against(need, profile, worker, seconds, now),
        serves=worker is not None,
        seconds=seconds,
        slowed=profile.node.slowed,
        score=profile.score.value,
    )


def expected_seconds(need: Need, worker: WorkerProfile) -> float | None:
    """Waiting as requests of late did, then computing the prompt, then generating; None without a speed to go by."""
    seconds = mean_wait_seconds(worker)
    for tokens, speed in ((need.prompt_tokens, worker.prompt_speed), (need.completion_tokens, worker.decode_speed)):
        if tokens and (speed is None or not speed.value):
            return None
        seconds += tokens / speed.value if speed is not None and tokens else 0.0
    return seconds


def _serving(model: str, profile: Profile) -> WorkerProfile | None:
    for worker in profile.workers.values():
        if worker.model and model in (worker.model, worker.model.partition("@")[0]):
            return worker
    return None


def _against(need: Need, profile: Profile, worker: WorkerProfile | None, seconds: float | None, now: float) -> str:
    age = now - profile.at
    if age > STALE_AFTER_SECONDS:
        return f"nothing was heard of it for {age:.0f} s"
    available = profile.node.available_bytes
    if worker is None and available is None:
        return f"it does not serve {need.model}, and its free memory is not known"
    if worker is None and available is not None and available.value < need.memory_bytes:
        free, needed = _megabytes(available.value), _megabytes(need.memory_bytes)
        return f"it does not serve {need.model} and has {free} free of the {needed} needed"
    if seconds is not None and need.deadline_seconds is not None and seconds > need.deadline_seconds:
        return f"it would take {seconds:.1f} s of {need.deadline_seconds:.1f} s"
    return ""


def _rank(each: Judgement, need: Need) -> tuple[bool, bool, bool, bool, float, float, str]:
    """The best first; equal ones by name, so that all who choose choose alike."""
    unsure = need.deadline_seconds is not None and each.seconds is None
    score = -round(each.score, 2)
    return bool(each.against), not each.serves, unsure, each.slowed, score, each.seconds or 0.0, each.device


def _praise(best: Judgement, need: Need) -> str:
    model = f"serves {need.model}" if best.serves else f"has the memory to load {need.model}"
    took = f", about {best.seconds:.1f} s" if best.seconds is not None else ""
    return f"{model}{took}, score {best.score:.2f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
