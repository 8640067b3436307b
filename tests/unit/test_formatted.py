"""Answers in a format: what their values stand on."""

import json
from typing import Any

import pytest

from edged.rag.formatted import unsupported
from edged.types import Grammar, JsonSchema

SCHEMA = JsonSchema(
    json.dumps(
        {
            "type": "object",
            "properties": {
                "severity": {"type": "integer", "minimum": 1, "maximum": 5},
                "action": {"enum": ["stop 1", "watch"]},
                "limit": {"type": "number"},
                "note": {"type": "string"},
                "list": {"type": "array", "items": {"type": "string"}},
            },
        }
    )
)
FACTS = ["The bearing may reach 95 °C.", "Fault E-217: top up oil, 250 ml."]


@pytest.mark.parametrize(
    ("answer", "missing"),
    [
        ({"severity": 4, "action": "stop 1", "limit": 95, "note": "95 °C", "list": []}, []),
        ({"limit": 95.0, "note": "E-217"}, []),
        ({"limit": 96}, ["96"]),
        ({"severity": 5, "note": "80 °C"}, ["80 °C"]),
        ({"list": ["250 ml", "300 ml"]}, ["300 ml"]),
        ({"note": "Fault E-218"}, ["E-218"]),
        ({"action": None, "list": [True]}, []),
    ],
)
def test_a_value_stands_on_the_facts_or_is_offered_by_the_schema(answer: Any, missing: list[str]) -> None:
    assert unsupported(json.dumps(answer), SCHEMA, FACTS) == missing


def test_of_a_text_by_grammar_every_number_must_stand() -> None:
    assert unsupported("95 °C or 96 °C", Grammar("root ::= [^\\n]+"), FACTS) == ["96 °C"]
