"""Which rule a topic falls under, and the question a plain value asks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import RequestError
from edged.events.trigger import TopicRule, question_from_value, rule_for

RULE = TopicRule(filter="plant/+/temperature", question="{topic[1]} at {value} °C ({topic}): what to do?", max_tokens=9)


def test_the_first_matching_rule_wins() -> None:
    other = TopicRule(filter="plant/#", question="?")
    assert rule_for("plant/pump/temperature", [RULE, other]) is RULE
    assert rule_for("plant/pump/level", [RULE, other]) is other
    assert rule_for("house/level", [RULE, other]) is None


def test_a_value_fills_the_template_and_stands_as_evidence() -> None:
    question = question_from_value(RULE, "plant/pump/temperature", b" 81.5\n")
    assert question.text == "pump at 81.5 °C (plant/pump/temperature): what to do?"
    assert question.evidence == "plant/pump/temperature: 81.5"
    assert question.max_tokens == 9


def test_a_value_that_looks_like_a_placeholder_is_not_filled_in() -> None:
    question = question_from_value(RULE, "plant/pump/temperature", b"{topic}{topic[0]}")
    assert "at {topic}{topic[0]} °C" in question.text


@pytest.mark.parametrize("payload", [b"", b"  \n", b"\xff\xfe", b"x" * 513])
def test_a_value_that_is_no_short_text_is_refused_with_advice(payload: bytes) -> None:
    with pytest.raises(RequestError) as refusal:
        question_from_value(RULE, "plant/pump/temperature", payload)
    assert refusal.value.hint


def test_a_level_the_topic_does_not_have_is_refused() -> None:
    rule = TopicRule(filter="a", question="{topic[3]}?")
    with pytest.raises(RequestError, match="level"):
        question_from_value(rule, "a", b"1")


@given(st.binary(max_size=600), st.text(min_size=1, max_size=40))
def test_any_payload_gives_a_question_or_a_refusal(payload: bytes, topic: str) -> None:
    try:
        question = question_from_value(RULE, topic, payload)
    except RequestError:
        return
    assert question.text
