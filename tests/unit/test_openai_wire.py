"""OpenAI's requests: understood, or refused by name; and what is written back, byte by byte."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edged.errors import (
    DeadlineError,
    EdgedError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
    UnauthorizedError,
    UnsupportedParameterError,
    WorkerLostError,
)
from edged.gateway import openai_wire
from edged.gateway.openai_wire import ChatRequest, CompletionRequest, EmbeddingsRequest, Style
from edged.types import Grammar, JsonSchema, Sampling
from edged.workers.protocol import Finished

PAGE = Path(__file__).parents[2] / "docs" / "OPENAI.md"
LINE_SEPARATOR = "\u2028"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}]}
FINISHED = Finished(
    id=1,
    reason="length",
    prompt_tokens=7,
    completion_tokens=5,
    cached_tokens=4,
    queue_ms=0,
    prefill_ms=0,
    generate_ms=0,
)


def chat(**parameters: object) -> ChatRequest:
    return openai_wire.parse(json.dumps({**ASKED, **parameters}).encode(), ChatRequest)


def completion(**parameters: object) -> CompletionRequest:
    body = {"model": "tiny", "prompt": "Once", **parameters}
    return openai_wire.parse(json.dumps(body).encode(), CompletionRequest)


def embeddings(**parameters: object) -> EmbeddingsRequest:
    body = {"model": "mini", "input": "oil", **parameters}
    return openai_wire.parse(json.dumps(body).encode(), EmbeddingsRequest)


def refused(kind: type[RequestError], field: str, **parameters: object) -> RequestError:
    """The refusal of a chat, after checking its kind and that it names the field."""
    with pytest.raises(kind) as caught:
        chat(**parameters)
    assert type(caught.value) is kind
    assert caught.value.facts["field"] == field
    assert f"'{field}'" in caught.value.message
    return caught.value


# --- what is understood ----------------------------------------------------------------------------


def test_a_plain_chat_has_openais_temperature_and_the_devices_own_sampling_otherwise() -> None:
    request = chat()
    assert request.conversation == [("user", "Why?")]
    assert request.sampling == Sampling(temperature=1.0)
    assert (request.output, request.stop, request.longest, request.stream) == (None, [], None, False)
    assert (request.priority, request.deadline_seconds, request.include_usage) == ("interactive", None, False)


def test_a_developer_is_the_system_and_text_parts_are_lines() -> None:
    parts = [{"type": "text", "text": "How hot?"}, {"type": "text", "text": "Why?"}]
    request = chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert request.conversation == [("system", "Be brief."), ("user", "How hot?\nWhy?")]


def test_an_answer_of_the_client_library_can_be_sent_back_as_it_came() -> None:
    message: dict[str, object] = {
        "role": "assistant",
        "content": "Hot.",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "function_call": None,
        "audio": None,
    }
    assert chat(messages=[*ASKED["messages"], message]).conversation[1] == ("assistant", "Hot.")


def test_every_way_of_choosing_tokens_is_passed_on() -> None:
    given_parameters = {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0, "repeat_penalty": 1.1, "seed": 42}
    expected = Sampling(temperature=0, top_p=0.5, top_k=7, min_p=0, repeat_penalty=1.1, seed=42)
    assert chat(**given_parameters).sampling == expected
    assert completion(**given_parameters).sampling == expected
    assert chat(top_k=-1).sampling.top_k == 0


@given(st.integers(-(2**63), 2**63 - 1))
def test_every_seed_is_one_that_llama_cpp_takes_and_none_means_any(seed: int) -> None:
    drawn = chat(seed=seed).sampling.seed
    assert drawn is not None
    assert 0 <= drawn < 2**32 - 1


def test_limits_stops_priority_and_deadline_are_passed_on() -> None:
    request = chat(max_completion_tokens=9, stop="END", priority="alarm", deadline_ms=1500)
    assert (request.longest, request.stop, request.priority, request.deadline_seconds) == (9, ["END"], "alarm", 1.5)
    assert chat(max_tokens=8, stop=["a", "b"]).longest == 8
    assert completion().max_tokens == 16


def test_an_answer_is_held_to_a_schema_any_object_or_a_grammar() -> None:
    schema = {"type": "object", "properties": {"é": {"const": None}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    held = chat(response_format=named).output
    assert isinstance(held, JsonSchema)
    assert json.loads(held.schema) == schema
    assert chat(response_format={"type": "json_object"}).output == JsonSchema('{"type":"object"}')
    assert chat(response_format={"type": "text"}).output is None
    assert chat(grammar='root ::= "a"').output == Grammar('root ::= "a"')


def test_what_asks_for_nothing_is_accepted() -> None:
    request = chat(
        n=1,
        tools=[],
        tool_choice="none",
        logprobs=False,
        logit_bias={},
        presence_penalty=0.0,
        frequency_penalty=0,
        stop=None,
        seed=None,
        user="me",
        metadata={"a": "b"},
        store=True,
    )
    assert request == chat()
    assert completion(best_of=1, echo=False, suffix=None, prompt=["Once"]) == completion()


def test_embeddings_take_a_text_or_a_list_of_texts() -> None:
    assert embeddings().input == ["oil"]
    assert embeddings(input=["oil", "pump"], encoding_format="base64", user="me").input == ["oil", "pump"]


# --- what is refused -------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"1": 5}),
        ("n", 2),
        ("n", True),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("reasoning_effort", "low"),
        ("web_search_options", {}),
        ("suffix", "x"),
        ("temprature", 0.5),
    ],
)
def test_a_parameter_that_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    error = refused(UnsupportedParameterError, name, **{name: value})
    assert openai_wire.status_of(error) == 400
    assert openai_wire.body_of(error)["error"]["code"] == "unsupported_parameter"  # type: ignore[index]


@pytest.mark.parametrize(("name", "value"), [("suffix", "x"), ("echo", True), ("best_of", 2), ("logprobs", 0)])
def test_a_completions_own_parameters_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UnsupportedParameterError, match=f"'{name}'"):
        completion(**{name: value})


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]], ["a", "b"]])
def test_a_prompt_that_is_not_one_text_is_refused_by_name(prompt: object) -> None:
    with pytest.raises(UnsupportedParameterError, match="'prompt'"):
        completion(prompt=prompt)


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]]])
def test_tokens_to_embed_are_refused_by_name(tokens: object) -> None:
    with pytest.raises(UnsupportedParameterError, match="'input'"):
        embeddings(input=tokens)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "tool", "content": "4", "tool_call_id": "x"}, "messages[0].tool_call_id"),
        ({"role": "tool", "content": "4"}, "messages[0].role"),
        ({"role": "assistant", "tool_calls": [TOOL]}, "messages[0].tool_calls"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, "messages[0].content[1]"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": "a", "mood": "b"}, "messages[0].mood"),
    ],
)
def test_what_a_message_cannot_hold_is_refused_by_name(message: object, field: str) -> None:
    refused(UnsupportedParameterError, field, messages=[message])


@pytest.mark.parametrize(
    ("field", "parameters"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": None}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": [{"text": "a"}]}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": "a\0"}]}),
        ("messages[0].role", {"messages": [{"role": "boss", "content": "a"}]}),
        ("model", {"model": 5}),
        ("temperature", {"temperature": 2.1}),
        ("temperature", {"temperature": "hot"}),
        ("top_p", {"top_p": -0.1}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_tokens": 1, "max_completion_tokens": 1}),
        ("stop", {"stop": ["a"] * 5}),
        ("stop[0]", {"stop": [""]}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("response_format", {"response_format": {"type": "yaml"}}),
        (
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        ),
        ("grammar", {"grammar": "a", "response_format": {"type": "json_object"}}),
        ("priority", {"priority": "first"}),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(field: str, parameters: dict[str, object]) -> None:
    error = refused(RequestError, field, **parameters)
    assert openai_wire.body_of(error)["error"]["code"] == "invalid_value"  # type: ignore[index]


def test_a_misspelt_parameter_is_answered_with_the_right_name() -> None:
    assert "did you mean 'temperature'?" in refused(UnsupportedParameterError, "temprature", temprature=1).hint


def test_a_mistake_of_megabytes_is_answered_in_a_line() -> None:
    assert len(refused(RequestError, "temperature", temperature="x" * 1_000_000).message) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted(
    {
        *ChatRequest.model_fields,
        *CompletionRequest.model_fields,
        *EmbeddingsRequest.model_fields,
        *openai_wire.UNSUPPORTED_IN_CHAT,
        *openai_wire.UNSUPPORTED_IN_COMPLETIONS,
        *openai_wire.IGNORED,
    }
)
parts = st.dictionaries(st.sampled_from(["type", "text", "image_url"]), st.sampled_from(["text", "a"]) | json_values)
message_names = st.sampled_from(["role", "content", "name", *openai_wire.UNSUPPORTED_IN_MESSAGES])
messages = st.lists(
    st.dictionaries(
        message_names, st.sampled_from(["user", "assistant", "tool"]) | st.lists(parts, max_size=2) | json_values
    ),
    max_size=3,
)
formats = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema"])},
    optional={"json_schema": st.dictionaries(st.sampled_from(["name", "schema", "strict"]), json_values)},
)
likely: st.SearchStrategy[Any] = (
    st.sampled_from(["a", 0, 1, -1, 0.5, 1e308, 10**400, True, [], {}, None]) | messages | formats
)
requests = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), likely | json_values) | json_values


@given(requests, st.sampled_from([ChatRequest, CompletionRequest, EmbeddingsRequest]))
@example({**ASKED, "temperature": 10**400}, ChatRequest)
@example({**ASKED, "seed": 10**400}, ChatRequest)
def test_any_json_is_a_request_or_a_refusal(body: Any, kind: type[ChatRequest]) -> None:
    if isinstance(body, dict):
        body = {"model": "tiny", "messages": ASKED["messages"], **body} if kind is ChatRequest else body
    try:
        request = openai_wire.parse(json.dumps(body).encode(), kind)
    except RequestError as error:
        assert openai_wire.status_of(error) == 400
        json.dumps(openai_wire.body_of(error))
        return
    assert isinstance(request, kind)
    if isinstance(request, ChatRequest | CompletionRequest):
        assert isinstance(request.output, Grammar | JsonSchema | None)
        assert request.sampling.temperature >= 0


@given(st.binary(max_size=64))
@example(b'{"model": "\\ud800"}')
@example(b"[" * 100_000)
@example(b'{"a":' * 5_000)
@example(b'{"temperature": NaN}')
def test_any_bytes_are_refused_and_never_an_exception_of_another_kind(body: bytes) -> None:
    with pytest.raises(RequestError):
        openai_wire.parse(body, ChatRequest)


# --- what is written -------------------------------------------------------------------------------


def events(data: bytes) -> list[Any]:
    """The data of server-sent events; the end mark stays text."""
    parts = [part.removeprefix("data: ") for part in data.decode("ascii").split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_streamed_chat_is_role_text_reason_usage_and_the_end_mark(include_usage: bool) -> None:
    chunks = Style("chat").chunks("chatcmpl-1", 12, "tiny@1", include_usage=include_usage)
    written = events(chunks.first() + chunks.text(f'"Hot"{LINE_SEPARATOR}\n') + chunks.last(FINISHED))
    assert written.pop() == "[DONE]"
    if include_usage:
        last = written.pop()
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 12)
    for chunk in written:
        head = (chunk["id"], chunk["object"], chunk["created"], chunk["model"])
        assert head == ("chatcmpl-1", "chat.completion.chunk", 12, "tiny@1")
        assert chunk.get("usage", "absent") == (None if include_usage else "absent")
    choices = [chunk["choices"][0] for chunk in written]
    assert choices[0]["delta"]["role"] == "assistant"
    assert choices[1]["delta"] == {"content": f'"Hot"{LINE_SEPARATOR}\n'}
    assert choices[2]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]


def test_a_streamed_completion_has_text_instead_of_deltas() -> None:
    chunks = Style("text").chunks("cmpl-1", 12, "tiny@1", include_usage=False)
    assert chunks.first() == b""
    piece, last, done = events(chunks.text("Hot") + chunks.last(FINISHED))
    assert (piece["object"], piece["choices"][0]["text"]) == ("text_completion", "Hot")
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"], done) == ("", "length", "[DONE]")


@given(st.text())
def test_any_text_survives_its_chunk(text: str) -> None:
    chunks = Style("chat").chunks("i", 1, 'a "model"', include_usage=False)
    part = chunks.text(text)
    assert part.count(b"\n") == 2
    assert events(part)[0]["choices"][0]["delta"]["content"] == text


def test_a_whole_answer_counts_what_was_cached() -> None:
    body = Style("chat").body("chatcmpl-1", 12, "tiny@1", "Hot.", FINISHED)
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hot.", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_vectors_are_shown_as_numbers_or_as_bytes() -> None:
    values = np.array([1.0, -0.5], np.float32)
    rows = [openai_wire.vector(values, "base64"), openai_wire.vector(values, "float")]
    shown = json.loads(openai_wire.embeddings_body("mini@1", rows, 3))
    assert [row["index"] for row in shown["data"]] == [0, 1]
    assert base64.b64decode(shown["data"][0]["embedding"]) == b"\0\0\x80\x3f\0\0\0\xbf"
    assert shown["data"][1]["embedding"] == [1.0, -0.5]
    assert shown["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (RequestError("m", field="a"), 400, "invalid_request_error", "invalid_value"),
        (UnauthorizedError("m"), 401, "invalid_request_error", "invalid_api_key"),
        (PromptTooLongError("m"), 400, "invalid_request_error", "context_length_exceeded"),
        (QueueFullError("m"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (WorkerLostError("m"), 503, "server_error", "worker_lost"),
        (DeadlineError("m"), 504, "server_error", "deadline_exceeded"),
        (EdgedError("m"), 500, "server_error", "internal"),
    ],
)
def test_an_error_has_openais_form(error: EdgedError, status: int, kind: str, code: str) -> None:
    assert openai_wire.status_of(error) == status
    expected = {"message": "m", "type": kind, "param": error.facts.get("field"), "code": code}
    assert openai_wire.body_of(error) == {"error": expected}
    assert events(openai_wire.error_event(error)) == [{"error": expected}]


# --- the documentation -----------------------------------------------------------------------------


def test_openai_md_describes_every_parameter_and_no_other() -> None:
    page = PAGE.read_text(encoding="utf-8")
    chats, _, rest = page.split("## `POST /v1/chat/completions`")[1].partition("## `POST /v1/completions`")
    listed = set(re.findall(r"^\| `(\w+)` \|", chats, flags=re.MULTILINE))
    assert listed == set(ChatRequest.model_fields)
    assert set(CompletionRequest.model_fields) - listed == {"prompt"}
    embeds = rest.split("## `POST /v1/embeddings`")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", embeds, flags=re.MULTILINE)) == set(EmbeddingsRequest.model_fields)


def test_openai_md_names_everything_that_is_ignored_or_refused() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = {*openai_wire.IGNORED, *openai_wire.UNSUPPORTED_IN_CHAT, *openai_wire.UNSUPPORTED_IN_COMPLETIONS}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
