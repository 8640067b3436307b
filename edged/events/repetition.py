"""Whether a message whose id is known repeats an event: pure. It does when the same was sent, not only the same id."""

from enum import Enum, auto

import msgspec

from edged.events.event import Incoming


class Earlier(msgspec.Struct, frozen=True, kw_only=True):
    """The event that has a message's id already.

    ``is_lasting``: no answer can come that is better than the one it got. ``is_published``: its answer went out.
    """

    source: str
    topic: str
    payload: bytes
    is_open: bool
    is_lasting: bool
    is_published: bool


class Verdict(Enum):
    """``REPEATED``: the same event. ``ANEW``: another one, which takes the id. ``REUSED``: another one, too early."""

    REPEATED = auto()
    ANEW = auto()
    REUSED = auto()


def judge(earlier: Earlier, incoming: Incoming) -> Verdict:
    """What a message is to the event of its id.

    An event gives its id away once its answer is out: to another event, or to itself where it failed for a time.
    """
    is_same = is_repeated(earlier, incoming)
    if not earlier.is_open and earlier.is_published and not (is_same and earlier.is_lasting):
        return Verdict.ANEW
    return Verdict.REPEATED if is_same else Verdict.REUSED


def is_repeated(earlier: Earlier, incoming: Incoming) -> bool:
    """Whether the same was sent by the same way; where the answer is to go may differ."""
    return (earlier.source, earlier.topic, earlier.payload) == (incoming.source, incoming.topic, incoming.payload)
