"""Golden questions: reading the file, judging the answers."""

import pytest

from edged.errors import RequestError
from edged.serving.golden import DEFAULT_QUESTIONS, GoldenQuestion, parse_golden, speaks, well_formed
from edged.types import Grammar, JsonSchema

FILE = """
[[question]]
ask = "What is the capital of France?"
contains = ["Paris"]

[[question]]
system = "Answer with JSON."
ask = "What colour has the sky?"
json_schema = { type = "object", properties = { colour = { type = "string" } }, required = ["colour"] }
max_tokens = 30

[[question]]
ask = "What is 2 + 2?"
matches = '\\b(4|four)\\b'
"""


def test_a_file_gives_its_questions_in_order() -> None:
    first, second, third = parse_golden(FILE)
    assert first.contains == ("Paris",)
    assert second.messages == [("system", "Answer with JSON."), ("user", "What colour has the sky?")]
    assert isinstance(second.output, JsonSchema)
    assert third.matches == r"\b(4|four)\b"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[question]\n", "no valid TOML"),
        ("", "question"),
        ('[[question]]\nask = ""\n', "question.0.ask"),
        ('[[question]]\nask = "x"\nmatches = "("\n', "no regular expression"),
        ('[[question]]\nask = "x"\nanswer = "y"\n', "question.0.answer"),
    ],
)
def test_a_wrong_file_is_refused_saying_where(text: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        parse_golden(text)


def test_an_answer_must_hold_what_was_demanded() -> None:
    question = GoldenQuestion(ask="?", contains=("Paris",), matches=r"capital")
    assert question.objection("paris is the capital", complete=True) == ""
    assert question.objection("London is the capital", complete=True) == "'Paris' is not in it"
    assert "does not match" in question.objection("It is Paris", complete=True)


def test_json_must_parse_and_be_complete() -> None:
    question = GoldenQuestion(ask="?", json_schema={"type": "object"})
    assert question.objection('{"a": 1}', complete=True) == ""
    assert question.objection('{"a": 1', complete=True) == "no JSON of its schema"
    assert question.objection('{"a": 1}', complete=False) == "no JSON of its schema"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Paris.", True),
        ("红、绿、蓝", True),
        ("4", True),
        ("", False),
        ("\n\n ...", False),
        ("la " * 20, False),
        ("la la la", True),
        ("good \ufffd\ufffd bad", False),
        ("cut in the middle \ufffd", True),
    ],
)
def test_speech_is_told_from_noise(text: str, said: bool) -> None:
    assert speaks(text) == said


def test_a_grammar_holds_by_itself() -> None:
    assert well_formed("...", Grammar('root ::= "."'), complete=True)


def test_the_default_questions_demand_nothing_but_speech() -> None:
    assert all(not question.objection("Something.", complete=True) for question in DEFAULT_QUESTIONS)
