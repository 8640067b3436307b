"""Held to a format: whatever the model would rather say, the result parses and validates."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edged.config import Config
from edged.engine.llama import Model, quiet
from edged.models.catalog import Catalog
from edged.types import Grammar, JsonSchema, OutputFormat, Sampling, Segment
from edged.workers.protocol import Failed, Finished, Generate
from tests.integration.test_prefix_reuse import Engine

pytestmark = pytest.mark.models

REPORT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "severity": {"type": "integer", "minimum": 1, "maximum": 5},
        "action": {"enum": ["stop", "watch", "none"]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 4},
        "note": {"type": "string"},
        "when": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        "code": {"type": "string", "pattern": "^E-[0-9]{3}$"},
    },
    "required": ["severity", "action", "parts", "note", "when", "code"],
    "additionalProperties": False,
    "$defs": {
        "part": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}, "required": ["name"]}
    },
}
SCHEMAS: list[Any] = [
    REPORT,
    {"type": "object"},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    {"type": "string", "maxLength": 20},
    {"anyOf": [{"const": "yes"}, {"const": "no"}]},
    {},
]


@pytest.fixture(scope="module")
def engine(models_home: Path) -> Iterator[Engine]:
    quiet()
    model = Model(Catalog(models_home / "models", models_home / "cache").path(Config().chat.model))
    engine = Engine(model)
    yield engine
    engine.close()
    model.close()


def asked(output: OutputFormat, *, tokens: int = 160, sampling: Sampling | None = None) -> Generate:
    prompt = (
        Segment("<|im_start|>user\n", special=True),
        Segment("The bearing of pump 7 is 95 degrees hot. Report, as text or JSON, whatever you like."),
        Segment("<|im_end|>\n<|im_start|>assistant\n", special=True),
    )
    return Generate(id=1, prompt=prompt, max_tokens=tokens, output=output, sampling=sampling or Sampling())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=7)])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_result_of_a_schema_parses_and_validates(engine: Engine, schema: Any, sampling: Sampling) -> None:
    ((text, last),) = engine.ask(asked(JsonSchema(json.dumps(schema)), sampling=sampling))
    assert last.reason == "stop"
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("tokens", [90, 110])
def test_a_text_that_grows_towards_its_longest_length_is_closed_in_time(engine: Engine, tokens: int) -> None:
    endless = {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}
    ((text, last),) = engine.ask(asked(JsonSchema(json.dumps(endless)), tokens=tokens))
    assert last.reason == "stop"
    jsonschema.validate(json.loads(text), endless)


def test_a_grammar_is_kept_to(engine: Engine) -> None:
    ((text, _),) = engine.ask(asked(Grammar('root ::= "valve " [0-9] [0-9]')))
    assert text.startswith("valve ")
    assert text[6:].isdigit()
    assert len(text) == 8


@pytest.mark.parametrize(
    "output",
    [
        Grammar("root ::= nothing"),
        Grammar(""),
        Grammar("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000),
        JsonSchema('{"minProperties": 1}'),
    ],
)
def test_a_format_that_cannot_be_held_to_is_refused_and_leaves_nothing_behind(
    engine: Engine, output: OutputFormat
) -> None:
    engine.replies.clear()
    engine.chat.handle(asked(output), 0.0)
    (refusal,) = engine.replies
    assert isinstance(refusal, Failed)
    assert refusal.code == "output_format_invalid"
    assert not engine.chat.busy


def test_the_same_seed_says_the_same_and_another_one_something_else(engine: Engine) -> None:
    texts = []
    for seed in (1, 1, 2):
        sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        given = asked(Grammar("root ::= [a-z ]+"), tokens=24, sampling=sampling)
        ((text, last),) = engine.ask(Generate(id=1, prompt=given.prompt, max_tokens=24, sampling=sampling))
        assert isinstance(last, Finished)
        texts.append(text)
    assert texts[0] == texts[1] != texts[2]
