"""Answers held to a format: which of their values the evidence does not hold; pure."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from edged.rag.verify import verify
from edged.types import JsonSchema, OutputFormat


def unsupported(text: str, output: OutputFormat, evidence: Sequence[str]) -> list[str]:
    """Numbers (with their unit) and codes of an answer that stand neither in the evidence nor in the schema itself.

    A schema's own enumerations, constants and integer ranges are choices that its author offers: "severity": 4 of 1 to
    5 is a judgement and needs no sentence that says 4.
    """
    if not isinstance(output, JsonSchema):
        return verify(text, evidence)
    offered = list(_offered(json.loads(output.schema)))
    values = (value for value in _leaves(json.loads(text)) if not any(_is_offered(value, each) for each in offered))
    return [missing for value in values for missing in verify(str(value), evidence)]


def _leaves(value: Any) -> Iterator[str | int | float]:
    """The strings and numbers of a JSON value; the names of its fields are the schema's, not the model's."""
    match value:
        case dict():
            for inner in value.values():
                yield from _leaves(inner)
        case list():
            for inner in value:
                yield from _leaves(inner)
        case bool() | None:
            return
        case _:
            yield value


def _offered(schema: Any) -> Iterator[Any]:
    """Values and ranges that a schema lets one choose from."""
    if isinstance(schema, list):
        for inner in schema:
            yield from _offered(inner)
    if not isinstance(schema, dict):
        return
    yield from schema.get("enum", ())
    if "const" in schema:
        yield schema["const"]
    if "minimum" in schema and "maximum" in schema:
        yield range(schema["minimum"], schema["maximum"] + 1)
    for inner in schema.values():
        yield from _offered(inner)


def _is_offered(value: str | int | float, offered: Any) -> bool:
    return value in offered if isinstance(offered, range) else value == offered
