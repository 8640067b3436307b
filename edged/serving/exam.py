"""Golden questions asked of a chat model, and what came of them."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edged.errors import WorkerError
from edged.models.rollout import Observed, Report
from edged.serving.chat import LocalChat
from edged.serving.golden import GoldenQuestion
from edged.workers.protocol import Finished, Piece
from edged.workers.worker import Lost

DEADLINE_SECONDS = 120.0


@dataclass(eq=False)
class Exam:
    """How a model answered: whether each question passed, what was wrong with the others, and in how many seconds."""

    passed: list[bool] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)
    observed: Observed = field(default_factory=Observed)
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """As evidence of a rollout shows it."""
        return {
            "passed": sum(self.passed),
            "of": len(self.passed),
            "objections": self.objections,
            **self.observed.told(),
        }


async def examine(chat: LocalChat, questions: Sequence[GoldenQuestion], progress: Callable[[int, int], None]) -> Exam:
    """Ask one question after another, behind all other requests; ``progress`` hears how many are done, of how many."""
    exam, began = Exam(), time.monotonic()
    for number, question in enumerate(questions):
        progress(number, len(questions))
        report, objection = await _ask(chat, question)
        exam.observed = exam.observed.add(report)
        exam.passed.append(not objection)
        if objection:
            exam.objections.append(f"'{question.ask}': {objection}")
    exam.seconds = time.monotonic() - began
    return exam


async def _ask(chat: LocalChat, question: GoldenQuestion) -> tuple[Report, str]:
    """How it went, and what is wrong with the answer; empty when nothing is."""
    texts: list[str] = []
    generation = chat.generate(
        chat.render(question.messages),
        max_tokens=question.max_tokens,
        output=question.output,
        priority="batch",
        deadline_seconds=DEADLINE_SECONDS,
    )
    try:
        async with contextlib.aclosing(generation):
            async for item in generation:
                match item:
                    case Piece(text=text):
                        texts.append(text)
                    case Lost():
                        texts.clear()
                    case Finished():
                        objection = question.objection("".join(texts), complete=item.reason == "stop")
                        seconds = item.generate_ms / 1e3
                        return Report(valid=not objection, tokens=item.completion_tokens, seconds=seconds), objection
    except WorkerError as error:
        return Report(failed=True), error.message
    return Report(failed=True), "no answer"
