"""The demo's manuals, its events and the benchmark's questions agree with each other."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edged.config import Events
from edged.events.trigger import TopicRule, question_from_value, rule_for
from edged.gateway.wire import parse_query
from edged.topics import matches

ROOT = Path(__file__).resolve().parents[2]
MANUALS = ROOT / "edged" / "demo" / "manuals"
EVENTS = ROOT / "edged" / "demo" / "events.toml"
QUESTIONS = ROOT / "benchmarks" / "data" / "manual_questions.toml"

CODE = re.compile(r"\b(?:[A-Z]{1,3}-\d{2,5}|F\d{2})\b")
"""Machine models, part numbers and fault codes: CP-250, PX-4410, E-217, F07."""

WORD = re.compile(r"\w[\w./-]*")


def table(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def manual(name: str) -> str:
    return (MANUALS / name).read_text(encoding="utf-8")


def question_of(message: dict[str, str]) -> str:
    """The question a message asks, as edged will see it."""
    payload = message["payload"].encode()
    topics = Events.model_validate(table(EVENTS)["events"]).topics
    rule = rule_for(message["topic"], [TopicRule(filter=topic.filter, question=topic.question) for topic in topics])
    return question_from_value(rule, message["topic"], payload).text if rule else parse_query(payload).query


BENCHMARK: list[dict[str, Any]] = table(QUESTIONS)["questions"]
MESSAGES: list[dict[str, str]] = table(EVENTS)["messages"]


@pytest.mark.parametrize("entry", BENCHMARK, ids=lambda entry: entry["question"])
def test_the_gold_answer_stands_in_the_named_document(entry: dict[str, Any]) -> None:
    assert entry["answer"][0] in manual(entry["document"])


@pytest.mark.parametrize("entry", BENCHMARK, ids=lambda entry: entry["question"])
def test_codes_and_part_numbers_of_a_question_stand_in_the_named_document(entry: dict[str, Any]) -> None:
    missing = [code for code in CODE.findall(entry["question"]) if code not in manual(entry["document"])]
    assert missing == []


@pytest.mark.parametrize("entry", BENCHMARK, ids=lambda entry: entry["question"])
def test_no_question_gives_its_own_answer_away(entry: dict[str, Any]) -> None:
    assert not [gold for gold in entry["answer"] if gold.lower() in entry["question"].lower()]


def test_there_are_fifty_different_questions_over_every_manual() -> None:
    assert len({entry["question"] for entry in BENCHMARK}) == 50
    assert {entry["document"] for entry in BENCHMARK} == {path.name for path in MANUALS.iterdir()}


def test_part_numbers_belong_to_one_manual_each() -> None:
    owners: dict[str, set[str]] = {}
    for path in MANUALS.iterdir():
        for number in re.findall(r"\b[A-Z]{2}-\d{4,5}\b", manual(path.name)):
            owners.setdefault(number, set()).add(path.name)
    assert {number: names for number, names in owners.items() if len(names) > 1} == {}


def test_every_part_number_of_a_text_is_in_its_spare_parts_list() -> None:
    for path in MANUALS.iterdir():
        text, _, parts = re.split(r"(?im)^(?:## |\d )(spare parts)$", manual(path.name))
        assert not set(re.findall(r"\b[A-Z]{2}-\d{4,5}\b", text)) - set(CODE.findall(parts)), path.name


def test_the_manuals_are_text_files_of_at_least_four_thousand_words() -> None:
    assert {path.suffix for path in MANUALS.iterdir()} == {".md", ".txt"}
    assert sum(len(WORD.findall(manual(path.name))) for path in MANUALS.iterdir()) >= 4000


def test_every_configured_topic_of_the_demo_gets_a_message() -> None:
    topics = Events.model_validate(table(EVENTS)["events"]).topics
    assert topics
    assert all(any(matches(topic.filter, message["topic"]) for message in MESSAGES) for topic in topics)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message["name"])
def test_a_sentence_of_the_manual_answers_a_demo_event(message: dict[str, str]) -> None:
    text = manual(message["document"])
    question = question_of(message)
    assert message["answer"] in text
    assert message["answer"] not in question
    assert [code for code in CODE.findall(question) if code not in text] == []


def test_the_demo_shows_a_query_with_an_id_a_plain_text_and_a_plain_value() -> None:
    queries = [message for message in MESSAGES if message["topic"] == "edged/query"]
    identified = [parse_query(message["payload"].encode()).id is not None for message in queries]
    assert (len(MESSAGES), identified) == (3, [True, False])
    assert "108.5 °C" in question_of(MESSAGES[2])
