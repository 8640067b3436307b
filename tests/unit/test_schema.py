"""JSON schemas: what becomes a grammar, and what is refused with its place."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.engine.schema import SchemaError, to_gbnf

REPORT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Report",
    "type": "object",
    "properties": {
        "severity": {"type": "integer", "minimum": 1, "maximum": 5, "description": "how bad"},
        "action": {"enum": ["stop", "watch", None]},
        "note": {"type": "string", "maxLength": 40},
        "when": {"type": "string", "format": "date-time"},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "minItems": 1, "maxItems": 3},
        "pair": {"prefixItems": [{"type": "number"}, {"type": "boolean"}], "items": False},
        "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["severity", "action"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "object", "properties": {"part": {"type": ["string", "null"]}}, "required": ["part"]}},
}


def test_a_schema_of_everything_held_to_becomes_a_grammar_with_a_root() -> None:
    grammar = to_gbnf(json.dumps(REPORT))
    assert "root ::=" in grammar
    assert '"1" | "2" | "3" | "4" | "5"' in grammar


def test_no_control_character_gets_into_a_string() -> None:
    assert r'char ::= [^"\\\x7F\x00-\x1F]' in to_gbnf('{"type": "string", "maxLength": 5}')


@pytest.mark.parametrize("pattern", ["^E-[0-9]{3}$", r"^\\-?[0-9]+\\.[0-9]$", "^(on|off)$", "^[A-Za-z_]+$"])
def test_patterns_of_named_characters_become_grammars(pattern: str) -> None:
    assert "root ::=" in to_gbnf(json.dumps({"type": "string", "pattern": pattern.replace("\\\\", "\\")}))


def test_references_with_equal_last_parts_are_different_things() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/x/string"}, "b": {"$ref": "#/$defs/y/string"}},
        "required": ["a", "b"],
        "$defs": {"x": {"string": {"const": 1}}, "y": {"string": {"const": 2}}},
    }
    grammar = to_gbnf(json.dumps(schema))
    assert '"1"' in grammar
    assert '"2"' in grammar


def test_a_schema_that_refers_to_itself_becomes_a_grammar() -> None:
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    assert "root ::=" in to_gbnf(
        json.dumps({"$ref": "#/$defs/node", "$defs": {"node": {**node, "required": ["next"]}}})
    )


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"type": "number", "minimum": 3}}}, "#/properties/a/minimum"),
        ({"type": "integer", "minimum": 3}, "#"),
        ({"type": "integer", "minimum": 0, "maximum": 10**9}, "#"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "#/uniqueItems"),
        ({"type": "object", "minProperties": 1}, "#/minProperties"),
        ({"oneOf": [{"type": "string"}]}, "#/oneOf"),
        ({"allOf": [{"type": "string"}]}, "#/allOf"),
        ({"not": {"type": "string"}}, "#/not"),
        ({"type": "string", "format": "email"}, "#/format"),
        ({"type": "string", "maxLength": 10**6}, "#/maxLength"),
        ({"type": "string", "pattern": "^a$", "maxLength": 2}, "#/maxLength"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "#/required"),
        ({"enum": ['say "hi"']}, "#/enum"),
        ({"enum": []}, "#/enum"),
        ({"const": "a\\b"}, "#/const"),
        ({"$ref": "https://example.org/schema.json"}, "#/$ref"),
        ({"$ref": "#/$defs/none"}, "#/$ref"),
        ({"type": "tuple"}, "#"),
        ({"type": "string", "pattern": "^.*$"}, "#/pattern"),
        ({"type": "string", "pattern": "^[^a]$"}, "#/pattern"),
        ({"type": "string", "pattern": "^[ -~]$"}, "#/pattern"),
        ({"type": "string", "pattern": "^[A-z]$"}, "#/pattern"),
        ({"type": "string", "pattern": "^\\d$"}, "#/pattern"),
        ({"type": "string", "pattern": '^a"$'}, "#/pattern"),
        ({"anyOf": [{"type": "string"}], "properties": {}}, "#/properties"),
        (False, "#"),
        ("string", "#"),
    ],
)
def test_what_cannot_be_held_to_is_refused_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(SchemaError) as refused:
        to_gbnf(json.dumps(schema))
    assert f" {place} " in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"type": "string", "pattern": "^(?=a)$"}', '{"type": "string", "pattern": "a"}']
)
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(SchemaError):
        to_gbnf(text)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "enum", "anyOf", "$ref", "required", "minimum", "pattern", "a"]
            ),
            inner | st.sampled_from(["object", "array", "string", "integer", "#/properties/a", "^a{2}$"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(ANY_JSON)
def test_any_json_is_a_grammar_or_a_named_refusal(schema: Any) -> None:
    try:
        assert "root ::=" in to_gbnf(json.dumps(schema))
    except SchemaError as refused:
        assert str(refused)
