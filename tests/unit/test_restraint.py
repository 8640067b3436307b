"""What the device cannot afford now is refused with a time to come back, or cut short."""

import contextlib
from collections.abc import AsyncGenerator

import pytest

from edged.errors import HTTP_STATUS, BatchShedError
from edged.serving.restraint import RETRY_AFTER_SECONDS, Restrained, Restraint
from edged.types import AnswerEvent, Delta, Question


def test_while_shedding_batch_work_alone_is_refused_and_told_when_to_come_back() -> None:
    restraint = Restraint()
    restraint.admit("batch")
    restraint.set(shedding=True, longest_answer=None)
    restraint.admit("interactive")
    restraint.admit("alarm")
    with pytest.raises(BatchShedError) as refused:
        restraint.admit("batch")
    assert refused.value.facts["retry_after_seconds"] == RETRY_AFTER_SECONDS
    assert (refused.value.retryable, HTTP_STATUS[refused.value.code]) == (True, 503)
    assert restraint.refused == 1


def test_an_answer_is_cut_to_what_can_be_afforded() -> None:
    restraint = Restraint()
    assert restraint.cap(4096) == 4096
    restraint.set(shedding=False, longest_answer=64)
    assert (restraint.cap(4096), restraint.cap(20)) == (64, 20)


def test_listeners_hear_of_changes_alone() -> None:
    restraint, heard = Restraint(), list[bool]()
    restraint.subscribe(lambda: heard.append(restraint.shedding))
    for shedding in (False, True, True, False):
        restraint.set(shedding=shedding, longest_answer=None)
    assert heard == [True, False]


class Echo:
    async def stream(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        yield Delta(question.text)


async def test_a_door_refuses_batch_questions_and_passes_all_others_on() -> None:
    restraint = Restraint()
    restraint.set(shedding=True, longest_answer=None)
    answers = Restrained(Echo(), restraint)
    async with contextlib.aclosing(answers.stream(Question(text="now"))) as events:
        assert [event async for event in events] == [Delta("now")]
    with pytest.raises(BatchShedError):
        await anext(answers.stream(Question(text="later", priority="batch")))
