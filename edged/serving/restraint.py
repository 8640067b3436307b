"""What the device cannot afford now, for those who let requests in: one small object, set by the care service."""

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final, Protocol

from edged.errors import BatchShedError
from edged.types import AnswerEvent, Priority, Question

RETRY_AFTER_SECONDS: Final = 30.0
"""A refused sender comes back then: memory that is short stays so for the tens of seconds until others have ended."""


class Restraint:
    """``shedding``: no batch work is taken. ``longest_answer``: tokens of an answer at most, None for no limit."""

    def __init__(self) -> None:
        self.shedding = False
        self.longest_answer: int | None = None
        self.refused = 0
        self._listeners: list[Callable[[], None]] = []

    def set(self, *, shedding: bool, longest_answer: int | None) -> None:
        """What holds from now on; listeners hear of a change."""
        changed = (shedding, longest_answer) != (self.shedding, self.longest_answer)
        self.shedding, self.longest_answer = shedding, longest_answer
        if changed:
            for listener in self._listeners:
                listener()

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after every change."""
        self._listeners.append(listener)

    def admit(self, priority: Priority) -> None:
        """Raise :class:`BatchShedError` for what is not taken now."""
        if self.shedding and priority == "batch":
            self.refused += 1
            raise BatchShedError(
                "memory is short: batch requests are not taken for now",
                hint="ask again later, or as interactive if somebody waits",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )

    def cap(self, max_tokens: int) -> int:
        """So many tokens of those asked for."""
        return max_tokens if self.longest_answer is None else min(max_tokens, self.longest_answer)


class Answers(Protocol):
    """Whoever answers questions."""

    def stream(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        """Ends with exactly one answer."""


class Restrained:
    """The same answers for a door whose callers can be told to come back: what is not taken now is refused."""

    def __init__(self, answers: Answers, restraint: Restraint) -> None:
        self._answers = answers
        self._restraint = restraint

    async def stream(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        """As the answers' own; raises :class:`BatchShedError` too."""
        self._restraint.admit(question.priority)
        async with contextlib.aclosing(self._answers.stream(question)) as events:
            async for event in events:
                yield event
