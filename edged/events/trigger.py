"""What an event asks: pure. A configured topic turns a plain value into a question; else the payload is a query."""

import re
from collections.abc import Sequence

import msgspec

from edged.errors import RequestError
from edged.topics import matches
from edged.types import OutputFormat, Priority, Question

LONGEST_VALUE_CHARACTERS = 512
_LEVEL = re.compile(r"\{topic\[(\d+)\]\}")


class TopicRule(msgspec.Struct, frozen=True, kw_only=True):
    """A topic filter and the question its values ask. See ``[[events.topics]]`` in the configuration."""

    filter: str
    question: str
    collection: str = "default"
    deadline_ms: int | None = None
    expires_s: float | None = None
    max_tokens: int | None = None
    priority: Priority = "interactive"
    output: OutputFormat | None = None


def rule_for(topic: str, rules: Sequence[TopicRule]) -> TopicRule | None:
    """The first rule whose filter matches."""
    return next((rule for rule in rules if matches(rule.filter, topic)), None)


def question_from_value(rule: TopicRule, topic: str, payload: bytes) -> Question:
    """The question a sensor's plain value asks. Raises :class:`RequestError` for what is no short text."""
    try:
        value = payload.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the payload on {topic} is no UTF-8 text", hint="send the value as plain text, such as 81.5"
        ) from error
    if not value or len(value) > LONGEST_VALUE_CHARACTERS:
        raise RequestError(
            f"the value on {topic} has {len(value)} characters",
            hint=f"send 1 to {LONGEST_VALUE_CHARACTERS} characters",
        )
    levels = topic.split("/")
    if any(int(number) >= len(levels) for number in _LEVEL.findall(rule.question)):
        raise RequestError(
            f"the question for {rule.filter} names a level that {topic} does not have",
            hint="count the levels of {topic[N]} from 0",
        )
    text = _LEVEL.sub(lambda match: levels[int(match[1])], rule.question)
    text = text.replace("{topic}", topic).replace("{value}", value)
    return Question(
        text=text,
        collection=rule.collection,
        max_tokens=rule.max_tokens,
        evidence=f"{topic}: {value}",
        priority=rule.priority,
        output=rule.output,
    )
