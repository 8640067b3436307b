"""What the workers served from one second to the next, and how fast, by their running counts. Pure."""

from collections.abc import Iterable, Mapping

import msgspec

from edged.probe.profile import Speed, Work
from edged.probe.sample import Watched
from edged.types import Served

SMOOTHING = 0.3
"""Weight of the newest second in which requests were finished."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A process to be measured, and what is known of the worker in it: its ``model``, what it ``served`` so far; the
    daemon itself has neither."""

    watched: Watched
    model: str = ""
    served: Served | None = None


class Progress(msgspec.Struct, frozen=True):
    """By name, the model, the counts and the speed as they were last."""

    seen: Mapping[str, Work] = {}

    def observe(self, subjects: Iterable[Subject]) -> tuple["Progress", dict[str, Work]]:
        """The next state, and what was served since the last one. Another model begins anew."""
        seen, works = {}, {}
        for subject in subjects:
            if subject.served is None:
                continue
            name = subject.watched.name
            before = self.seen.get(name)
            if before is None or before.model != subject.model or subject.served.requests < before.served.requests:
                before = Work(model=subject.model, served=Served())
            served = difference(before.served, subject.served)
            speed = Speed(
                _smooth(before.speed.prompt, served.prompt_tokens - served.cached_tokens, served.prefill_seconds),
                _smooth(before.speed.decode, served.finished_tokens, served.generate_seconds),
            )
            seen[name] = Work(model=subject.model, served=subject.served, speed=speed)
            works[name] = Work(model=subject.model, served=served, speed=speed)
        return Progress(seen), works


def difference(before: Served, after: Served) -> Served:
    """What was served in between."""
    return Served(**{name: getattr(after, name) - getattr(before, name) for name in Served.__struct_fields__})


def _smooth(before: float | None, tokens: int, seconds: float) -> float | None:
    if not tokens or not seconds:
        return before
    speed = tokens / seconds
    return speed if before is None else before + SMOOTHING * (speed - before)
