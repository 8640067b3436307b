"""The documents cannot lie: settings, commands and routes are compared with what the code declares.

``UPDATE_DOCS=1`` writes docs/CONFIG.md anew.
"""

import json
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import typer
from pydantic import ValidationError

from edged.cli import app
from edged.config import LIVE, settings
from edged.errors import HTTP_STATUS, EdgedError
from edged.events.event import Event
from edged.gateway import wire
from edged.gateway.http import create_app
from edged.gateway.mqtt import Rendering, piece_message
from edged.gateway.wire import QueryRequest
from edged.probe import profile
from edged.probe.sample import Cost, Source, Step
from edged.runtime.health import KINDS, Health
from edged.status import StatusBoard
from edged.types import Answer, Citation, Delta, Restarted, Timings

DOCS = Path(__file__).parents[2] / "docs"
HEAD = """\
# Configuration

One TOML file: `--config`, else `$EDGED_CONFIG`, else `<home>/edged.toml` where it exists. Unknown keys are errors.
Every setting but those of `[[events.topics]]` also has an environment variable, which goes over the file:
`http.listen` is `EDGED_HTTP__LISTEN`. `edged check` says what differs from the defaults. What is marked ↻ changes
without a restart: edit the file, then `systemctl reload edged`, or send SIGHUP. This page is made from
`edged/config.py`."""
VALUES = {bool: "true or false", int: "integer", float: "number", str: "text", profile.Delays: "delays"}
TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}


def render_settings() -> str:
    """docs/CONFIG.md: one table a section, in declaration order."""
    tables: dict[str, list[str]] = {}
    for name, field in settings():
        table, _, key = name.rpartition(".")
        mark = " ↻" if field.json_schema_extra == LIVE else ""
        row = f"| `{key}`{mark} | {type_of(field)} | {default_of(field)} | {description_of(field)} |"
        tables.setdefault(table, []).append(row)
    parts = [HEAD]
    for table, rows in tables.items():
        parts.append(
            "\n".join([f"## {section_title(table)}\n", "| setting | type | default | |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def description_of(field: Any) -> str:
    """The help text, with its placeholders kept from being taken for HTML."""
    return re.sub(r"(<[a-z ]+>[\w/<>-]*)", r"`\1`", field.description or "")


def section_title(table: str) -> str:
    if not table:
        return "Top level"
    return f"`[[{table.removesuffix('[]')}]]`" if table.endswith("[]") else f"`[{table}]`"


def type_of(field: Any) -> str:
    """The type in a reader's words, with its bounds."""
    annotation = field.annotation
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    members = [annotation, *typing.get_args(annotation)]
    for member in members:
        plain = typing.get_args(member)[0] if typing.get_origin(member) is typing.Annotated else member
        if plain in TYPES:
            return TYPES[plain] + bounds_of(field)
    return "tables"


def bounds_of(field: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f", {', '.join(bounds)}" if bounds else ""


def default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Path):
        value = str(value).replace(str(Path.home()), "~", 1)
    if value is None:
        return "unset"
    if value == ():
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command under its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def sections(document: str, heading: str) -> dict[str, str]:
    """The text under each heading whose title is code."""
    parts = re.split(rf"^{heading} `(.+)`$", (DOCS / document).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_config_md_is_made_from_the_settings() -> None:
    page = DOCS / "CONFIG.md"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(render_settings(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == render_settings(), "run this test with UPDATE_DOCS=1"


def test_cli_md_describes_every_command_and_no_other() -> None:
    declared = dict(commands(typer.main.get_command(app), "edged"))
    assert sections("CLI.md", "##").keys() == declared.keys()


def test_cli_md_describes_every_option_and_no_other() -> None:
    described = sections("CLI.md", "##")
    for name, command in commands(typer.main.get_command(app), "edged"):
        declared = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        listed = set(re.findall(r"^\* `(--[a-z-]+)", described[name], flags=re.MULTILINE))
        assert listed == declared - {"--help"}, name
        assert "--json" in declared, name


def routes() -> Iterator[str]:
    nobody: Any = None
    described = create_app(
        answers=nobody,
        documents=nobody,
        status=nobody,
        metrics=bytes,
        chats=nobody,
        embedders=nobody,
        rollouts=nobody,
        profiles=nobody,
        inspections=nobody,
        api_key=None,
        max_body_bytes=1,
    ).openapi()
    for path, methods in described["paths"].items():
        for method in methods:
            yield f"{method.upper()} {path}"


def test_http_md_describes_every_route_and_no_other() -> None:
    assert sections("HTTP.md", "###").keys() == {*routes(), "GET /openapi.json"}


def render_fields(kind: type[msgspec.Struct]) -> str:
    """The fields of a part of the profile as docs/PROFILE.md has them."""
    hints = typing.get_type_hints(kind)
    rows = [
        f"| `{name}` | {value_of(hints[name])} | {fact.unit} | {fact.merging.value} | {fact.description} |"
        for name, fact in profile.facts(kind)
    ]
    return "\n".join(["| field | value | unit | in a window | |", "|---|---|---|---|---|", *rows])


def value_of(hint: Any) -> str:
    """What a field of the profile holds, in a reader's words."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    inner = members[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint
    if typing.get_origin(inner) is profile.Figure:
        return f"figure: {value_of(typing.get_args(inner)[0])}"
    if typing.get_origin(inner) is dict:
        return f"{value_of(typing.get_args(inner)[1])} by {'core' if typing.get_args(inner)[0] is int else 'reason'}"
    return "list" if typing.get_origin(inner) is tuple else VALUES[inner]


@pytest.mark.parametrize("kind", [profile.WorkerProfile, profile.NodeProfile])
def test_profile_md_has_the_fields_as_they_are_declared(kind: type[msgspec.Struct]) -> None:
    page = DOCS / "PROFILE.md"
    text = page.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- fields of {kind.__name__} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
    if os.environ.get("UPDATE_DOCS"):
        text = place.sub(lambda found: f"{found[1]}{render_fields(kind)}\n{found[3]}", text)
        page.write_text(text, encoding="utf-8")
    found = place.search(text)
    assert found is not None
    assert found[2].strip() == render_fields(kind), "run this test with UPDATE_DOCS=1"


@pytest.mark.parametrize(
    "kind", [profile.Profile, profile.Figure, profile.Delays, profile.Score, profile.Weights, Cost]
)
def test_profile_md_names_every_other_field_every_source_and_every_step(kind: type[msgspec.Struct]) -> None:
    text = (DOCS / "PROFILE.md").read_text(encoding="utf-8")
    names = [*kind.__struct_fields__, *(each.value for each in (*Source, *Step))]
    assert [name for name in names if f"`{name}`" not in text] == []


def test_mqtt_md_lists_the_fields_of_a_question_and_no_other() -> None:
    questions = (DOCS / "MQTT.md").read_text(encoding="utf-8").split("## Questions")[1].split("## Answers")[0]
    assert re.findall(r"^\| `(\w+)` \|", questions, flags=re.MULTILINE) == list(QueryRequest.model_fields)


def mqtt_messages() -> dict[str, bytes]:
    """One message of each kind, made by the code that makes them; no daemon runs."""
    event = Event(
        seq=1, id="e1", source="mqtt", topic="edged/query", payload=b"", reply_topic="edged/answer/e1",
        correlation=None, received_at=0.0, answer_by=None, expires_at=None,
    )  # fmt: skip
    cited = Citation("17.2", 17, "rs-75.md", "RS-75", ("Faults",), "E-217: the oil separator is clogged.", 812, 848)
    answer = Answer(
        text="", citations=(cited,), step="generated", note="", model="m", timings=Timings(first_token_ms=1.0)
    )
    nobody: Any = None
    board = StatusBoard(Health(), nobody, nobody, chat=nobody, embed=nobody, device="press-7")
    return {
        "answer": Rendering().answer(event, answer),
        "error": Rendering().error(event, wire.explain(_typo(), QueryRequest.model_fields)),
        "delta": piece_message(Delta("E-217 means that")),
        "restarted": piece_message(Restarted("the worker ended")),
        "status": wire.encode(board.summary()),
        "offline": wire.encode(board.farewell()),
    }


def _typo() -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        QueryRequest.model_validate({"quary": "?", "query": "?"})
    return list(caught.value.errors())


def shape(value: Any) -> Any:
    """The keys, in their order, and the kinds of values."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value)


def test_the_examples_in_mqtt_md_have_the_shape_of_real_messages() -> None:
    page = (DOCS / "MQTT.md").read_text(encoding="utf-8")
    examples = dict(re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)```", page, flags=re.DOTALL))
    assert wire.parse_query(examples.pop("question").encode()).id is not None
    made = {kind: json.loads(message) for kind, message in mqtt_messages().items()}
    assert json.loads(examples["error"])["error"] == made["error"]["error"]
    made["status"]["conditions"] = ["chat_worker_down"]
    assert {kind: shape(json.loads(text)) for kind, text in examples.items()} == {
        kind: shape(message) for kind, message in made.items()
    }


def test_mqtt_md_says_of_each_error_whether_it_may_be_tried_again() -> None:
    page = (DOCS / "MQTT.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no) \|", page, flags=re.MULTILINE))
    known = {kind.code: kind.retryable for kind in error_kinds(EdgedError)}
    assert rows
    assert {code: word == "yes" for code, word in rows.items()} == {code: known.get(code) for code in rows}


def error_kinds(kind: type[EdgedError]) -> Iterator[type[EdgedError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from error_kinds(narrower)


def test_http_md_lists_every_status_of_an_error() -> None:
    page = (DOCS / "HTTP.md").read_text(encoding="utf-8")
    rows = {int(status): codes for status, codes in re.findall(r"^\| (\d{3}) \| (.+) \|$", page, flags=re.MULTILINE)}
    for code, status in HTTP_STATUS.items():
        assert f"`{code}`" in rows[status]


def test_operations_md_lists_every_condition_with_its_severity_and_advice() -> None:
    text = (DOCS / "OPERATIONS.md").read_text(encoding="utf-8")
    rows = [f"| `{kind.code}` | {kind.severity.value} | {kind.hint} |" for kind in KINDS]
    assert [row for row in rows if row not in text] == []


def test_architecture_md_names_only_modules_that_exist() -> None:
    text = (DOCS / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.split("## Where things are")[1].split("## Life of an event")[0]
    root = DOCS.parent / "edged"
    named = re.findall(r"^\| `(\w+)/` \| (.*) \|$", table, re.MULTILINE)
    missing = [
        f"{package}/{module}"
        for package, modules in named
        for module in re.findall(r"`(\w+)`", modules)
        if not (root / package / f"{module}.py").exists()
    ]
    assert named
    assert missing == []
