"""What OpenAI's clients send and expect: strict requests, response bodies, stream chunks, errors. Pure.

Nothing a client asks for is dropped silently: what is not done here is refused by its name, unless it was set to what
is done anyway (``n`` 1, no ``tools``), or cannot change an answer (:data:`IGNORED`).
"""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from edged.errors import (
    HTTP_STATUS,
    EdgedError,
    OutputFormatError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
    UnauthorizedError,
    UnsupportedParameterError,
)
from edged.gateway import wire
from edged.types import Grammar, JsonSchema, OutputFormat, Priority, Sampling
from edged.workers.protocol import Finished

MOST_INPUTS = 2048
MOST_TOKENS = 2**31 - 1
SEEDS = 2**32 - 1  # llama.cpp's seeds; the one above them means "any"

IGNORED = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"})
"""Parameters of the whole request that cannot change its answer."""

Encoding = Literal["float", "base64"]
Accepted = Mapping[str, Sequence[object]]
"""By the name of a parameter that is not supported, the values that ask for nothing."""

_UNSUPPORTED_ANYWHERE: Accepted = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
UNSUPPORTED_IN_CHAT: Accepted = {
    **_UNSUPPORTED_ANYWHERE,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
UNSUPPORTED_IN_COMPLETIONS: Accepted = {
    **_UNSUPPORTED_ANYWHERE,
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "logprobs": (),
}
UNSUPPORTED_IN_MESSAGES: Accepted = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "audio": (),
    "refusal": (),
    "annotations": ([],),
}
IGNORED_IN_MESSAGES = frozenset({"name"})


def _unsupported(what: str, name: str = "") -> PydanticCustomError:
    """``name`` is that of a member of what is being validated."""
    return PydanticCustomError("unsupported_parameter", "{what} not supported here", {"what": what, "name": name})


def _without_neutral(raw: object, unsupported: Accepted, ignored: frozenset[str]) -> object:
    """An object less what asks for nothing: nulls, ignored names, unsupported ones at a value that is done anyway."""
    if not isinstance(raw, dict):
        return raw
    for name, value in raw.items():
        if name in unsupported and value is not None and not any(_same(value, done) for done in unsupported[name]):
            raise _unsupported(f"'{name}' = {wire.shown(value)} is", name)
    return {
        name: value
        for name, value in raw.items()
        if value is not None and name not in unsupported and name not in ignored
    }


def _same(value: object, accepted: object) -> bool:
    return value == accepted and isinstance(value, bool) == isinstance(accepted, bool)


# --- requests --------------------------------------------------------------------------------------


class TextPart(wire.StrictRequest):
    """A part of a message."""

    type: Literal["text"]
    text: wire.Text


def _joined_parts(content: object) -> object:
    """A list of text parts as one text, a line each."""
    if not isinstance(content, list) or not content:
        return content
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise _unsupported(f"parts of type {wire.shown(kind)} are", str(index))
    try:
        return "\n".join(TextPart.model_validate(part).text for part in content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise PydanticCustomError("text_part", "a text part: {why}", {"why": f"{name} {first['msg']}"}) from None


def _role(role: object) -> object:
    if role in ("tool", "function"):
        raise _unsupported(f"the role '{role}' is")
    return role


class ChatMessage(wire.StrictRequest):
    """One message of a conversation. ``developer`` is ``system`` by its newer name."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[
        wire.Text,
        BeforeValidator(_joined_parts),
        WithJsonSchema(
            {"anyOf": [{"type": "string"}, {"type": "array", "items": TextPart.model_json_schema(), "minItems": 1}]}
        ),
    ] = Field(description="Text, or a list of text parts.")

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, raw: object) -> object:
        return _without_neutral(raw, UNSUPPORTED_IN_MESSAGES, IGNORED_IN_MESSAGES)


class TextFormat(wire.StrictRequest):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(wire.StrictRequest):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(wire.StrictRequest):
    """A JSON schema; it is held to whether ``strict`` or not."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(wire.StrictRequest):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(wire.StrictRequest):
    """``include_obfuscation`` is accepted and nothing is padded: nobody else sees the stream's lengths."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class GenerationRequest(wire.StrictRequest):
    """What chats and completions have in common."""

    model: str = Field(min_length=1, max_length=512, description="A model of GET /v1/models, by id or identity.")
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="Longest answer, tokens.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float | None = Field(None, ge=0, le=1, description="Tokens of this joint probability; 0.95.")
    top_k: int | None = Field(None, ge=-1, le=MOST_TOKENS, description="So many likeliest tokens; 40, 0 for all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Tokens this probable beside the likeliest; 0.05.")
    repeat_penalty: float | None = Field(None, gt=0, le=10, description="Divides what was said lately; 1.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed draws the same tokens.")
    stop: Annotated[
        list[Annotated[wire.Text, StringConstraints(min_length=1)]],
        BeforeValidator(_as_list),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]}),
    ] = Field(default_factory=list, max_length=4, description="Texts that end the answer, not shown themselves.")
    stream: bool = Field(False, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    response_format: ResponseFormat | None = Field(None, description="What the answer is held to.")
    grammar: wire.Text | None = Field(None, min_length=1, description="A GBNF grammar the answer is held to.")
    priority: Priority = Field("interactive", description="Who goes first.")
    deadline_ms: int | None = Field(None, ge=1, le=wire.DAY_MS, description="Give up after this time, milliseconds.")

    @model_validator(mode="after")
    def _coherent(self) -> "GenerationRequest":
        if self.grammar is not None and self.output_by_format is not None:
            raise PydanticCustomError("both", "it goes without 'response_format'", {"name": "grammar"})
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("alone", "it goes only with 'stream': true", {"name": "stream_options"})
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def deadline_seconds(self) -> float | None:
        return None if self.deadline_ms is None else self.deadline_ms / 1000

    @property
    def output_by_format(self) -> OutputFormat | None:
        match self.response_format:
            case JsonObjectFormat():
                return JsonSchema('{"type":"object"}')
            case JsonSchemaFormat(json_schema=named):
                return JsonSchema(json.dumps(named.schema_, ensure_ascii=False))
        return None

    @property
    def output(self) -> OutputFormat | None:
        """What the answer is held to."""
        return Grammar(self.grammar) if self.grammar is not None else self.output_by_format

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; what the client left open but ``temperature`` is the device's own."""
        given = {
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "seed": None if self.seed is None else self.seed % SEEDS,
        }
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Sampling(temperature=self.temperature, **chosen)


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="max_tokens by its newer name.")

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, raw: object) -> object:
        return _without_neutral(raw, UNSUPPORTED_IN_CHAT, IGNORED)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("both", "it goes without 'max_tokens'", {"name": "max_completion_tokens"})
        return self

    @property
    def conversation(self) -> list[tuple[str, str]]:
        """Role and content of each message, in the template's words."""
        return [
            ("system" if message.role == "developer" else message.role, message.content) for message in self.messages
        ]

    @property
    def longest(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens


def _one_prompt(prompt: object) -> object:
    if not isinstance(prompt, list):
        return prompt
    if any(isinstance(item, int | list) for item in prompt):
        raise _unsupported("a list of tokens is")
    if len(prompt) > 1:
        raise _unsupported(f"a list of {len(prompt)} prompts is")
    return prompt[0] if prompt else prompt


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Annotated[
        wire.Text,
        BeforeValidator(_one_prompt),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 1}]}),
    ] = Field(min_length=1, description="The text to continue. Special tokens in it are the model's own.")
    max_tokens: int = Field(16, ge=1, le=MOST_TOKENS, description="Longest answer, tokens.")

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, raw: object) -> object:
        return _without_neutral(raw, UNSUPPORTED_IN_COMPLETIONS, IGNORED)


def _texts(given: object) -> object:
    if isinstance(given, list) and any(isinstance(item, int | list) for item in given):
        raise _unsupported("a list of tokens is")
    return _as_list(given)


class EmbeddingsRequest(wire.StrictRequest):
    """``POST /v1/embeddings``."""

    model: str = Field(min_length=1, max_length=512, description="The embedding model of GET /v1/models.")
    input: Annotated[
        list[Annotated[wire.Text, StringConstraints(min_length=1)]],
        BeforeValidator(_texts),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = Field(min_length=1, max_length=MOST_INPUTS, description="A text, or a list of texts.")
    encoding_format: Encoding = Field("float", description="base64: of float32, little-endian.")
    dimensions: int | None = Field(None, ge=1, description="Only the model's own number.")

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, raw: object) -> object:
        return _without_neutral(raw, {}, IGNORED)


RequestType = TypeVar("RequestType", ChatRequest, CompletionRequest, EmbeddingsRequest)


def parse(body: bytes, model: type[RequestType]) -> RequestType:
    """A request out of a JSON text.

    Raises :class:`UnsupportedParameterError` or :class:`RequestError`; their fact ``field`` names the parameter.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error.errors()[0], list(model.model_fields)) from error


def _explain(first: Mapping[str, Any], names: Sequence[str]) -> RequestError:
    place = [part for index, part in enumerate(first["loc"]) if (index, first["loc"][0]) != (1, "response_format")]
    member = str(first.get("ctx", {}).get("name", ""))
    field = _field([*place, member] if member else place)
    reason = str(first["msg"]).removeprefix("Value error, ")
    match first["type"]:
        case "json_invalid":
            return RequestError(f"the body is no valid JSON: {reason.removeprefix('Invalid JSON: ')}", hint="")
        case "unsupported_parameter":
            return UnsupportedParameterError(f"'{field}': {reason}", hint="leave it out", field=field)
        case "extra_forbidden":
            hint = wire.nearest(field, names) if len(first["loc"]) == 1 else "leave it out"
            return UnsupportedParameterError(f"'{field}': there is no such parameter", hint=hint, field=field)
        case "missing":
            return RequestError(f"'{field}' is missing", hint=f"add '{field}' to the request", field=field)
        case _ if not field:
            return RequestError(f"the body is not usable: {reason}", hint="send one JSON object")
    shown = "" if member else f" = {wire.shown(first['input'])}"
    return RequestError(f"'{field}'{shown}: {reason}", hint="", field=field)


def _field(location: Sequence[object]) -> str:
    """A place in the request as OpenAI writes it: ``messages[0].content``."""
    text = ""
    for part in location:
        if isinstance(part, int) or str(part).isdigit():
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


# --- responses -------------------------------------------------------------------------------------


def usage(finished: Finished) -> dict[str, object]:
    """The count of tokens; ``cached_tokens`` of the prompt cost nothing."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


class Style:
    """How one kind of answer is written: a chat's messages or a completion's text."""

    def __init__(self, kind: Literal["chat", "text"]) -> None:
        self._chat = kind == "chat"

    @property
    def id_prefix(self) -> str:
        return "chatcmpl-" if self._chat else "cmpl-"

    def body(self, identifier: str, created: int, model: str, text: str, finished: Finished) -> dict[str, object]:
        """A whole answer. ``created`` is Unix time in seconds."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {
            "id": identifier,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": created,
            "model": model,
            "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finished.reason}],
            "usage": usage(finished),
        }

    def chunks(self, identifier: str, created: int, model: str, *, include_usage: bool) -> "Chunks":
        """The writer of one streamed answer."""
        head = {
            "id": identifier,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": created,
            "model": model,
        }
        return Chunks(head, chat=self._chat, include_usage=include_usage)


class Chunks:
    """The chunks of one streamed answer as server-sent events; what never changes in them is built once.

    Text is escaped to ASCII: many clients split lines at U+2028 and its like, which JSON leaves as they are.
    """

    def __init__(self, head: Mapping[str, object], *, chat: bool, include_usage: bool) -> None:
        self._head = head
        self._chat = chat
        self._include_usage = include_usage
        self._before, self._after = self._event("\0", None).split(json.dumps("\0").encode())

    def first(self) -> bytes:
        """Who speaks; nothing in completions."""
        return self._render({"delta": {"role": "assistant", "content": "", "refusal": None}}) if self._chat else b""

    def text(self, text: str) -> bytes:
        """The next piece."""
        return self._before + json.dumps(text).encode() + self._after

    def last(self, finished: Finished) -> bytes:
        """Why the answer ended, its usage where asked for, and the end mark."""
        end = self._event(None, finished.reason)
        if self._include_usage:
            end += _sse({**self._head, "choices": [], "usage": usage(finished)})
        return end + b"data: [DONE]\n\n"

    def _event(self, text: str | None, reason: str | None) -> bytes:
        if self._chat:
            return self._render({"delta": {} if text is None else {"content": text}}, reason)
        return self._render({"text": text or ""}, reason)

    def _render(self, said: dict[str, object], reason: str | None = None) -> bytes:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        nothing_yet = {"usage": None} if self._include_usage else {}
        return _sse({**self._head, "choices": [choice], **nothing_yet})


def _sse(data: object) -> bytes:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def vector(values: npt.NDArray[np.float32], encoding: Encoding) -> msgspec.Raw:
    """One vector as JSON: its numbers, or its bytes (little-endian) in base64."""
    if encoding == "base64":
        return msgspec.Raw(b'"' + base64.b64encode(values.astype("<f4").tobytes()) + b'"')
    return msgspec.Raw(msgspec.json.encode(values.tolist()))


def embeddings_body(model: str, vectors: Sequence[msgspec.Raw], tokens: int) -> bytes:
    """All of them, in the order of their texts, which had so many ``tokens`` together."""
    data = [{"object": "embedding", "index": index, "embedding": shown} for index, shown in enumerate(vectors)]
    counted = {"prompt_tokens": tokens, "total_tokens": tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": counted})


def model_body(identity: str, created: int) -> dict[str, object]:
    """A served model; its ``id`` is its name, ``root`` names the very file."""
    return {
        "id": identity.partition("@")[0],
        "object": "model",
        "created": created,
        "owned_by": "edged",
        "root": identity,
    }


# --- errors ----------------------------------------------------------------------------------------

STATUS = {
    **HTTP_STATUS,
    RequestError.code: 400,
    PromptTooLongError.code: 400,
    OutputFormatError.code: 400,
    QueueFullError.code: 429,
}
"""Error code to HTTP status where OpenAI's clients expect another than :data:`~edged.errors.HTTP_STATUS` has."""

_CODES = {
    RequestError.code: "invalid_value",
    PromptTooLongError.code: "context_length_exceeded",
    QueueFullError.code: "rate_limit_exceeded",
    UnauthorizedError.code: "invalid_api_key",
}


def status_of(error: EdgedError) -> int:
    return STATUS.get(error.code, 500)


def error_body(status: int, code: str, message: str, hint: str = "", param: object = None) -> dict[str, object]:
    """The one form of an error: ``{"error": {"message", "type", "param", "code"}}``."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    text = f"{message} ({hint})" if hint else message
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def body_of(error: EdgedError) -> dict[str, object]:
    """An error of ours in that form; ``param`` is its fact ``field``."""
    code = _CODES.get(error.code, error.code)
    return error_body(status_of(error), code, error.message, error.hint, error.facts.get("field"))


def error_event(error: EdgedError) -> bytes:
    """The event that ends a stream that cannot go on."""
    return _sse(body_of(error))
