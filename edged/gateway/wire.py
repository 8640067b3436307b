"""What the doors say and understand: one set of strict requests, answers and errors for MQTT and HTTP."""

import codecs
import difflib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from edged.errors import EdgedError, RequestError
from edged.types import (
    Answer,
    DocumentInfo,
    Grammar,
    Ingested,
    JsonSchema,
    OutputFormat,
    Priority,
    Question,
    Step,
)

SHOWN_CHARACTERS = 60  # of a refused value; a sender's mistake may be megabytes long
DAY_MS = 86_400_000
YEAR_SECONDS = 31_536_000


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("it holds a NUL character; is it binary data?")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it holds only blanks")
    return text


Text = Annotated[str, AfterValidator(_without_nul)]
EVENT_ID = r"[A-Za-z0-9._:-]{1,128}"
EventId = Annotated[str, StringConstraints(pattern=f"^{EVENT_ID}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,128}$"), AfterValidator(_not_blank)]
DocumentId = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,512}$"), AfterValidator(_not_blank)]


class StrictRequest(BaseModel):
    """Strict: exact types, unknown keys refused, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class FormatBody(StrictRequest):
    """The form an answer is held to: a JSON schema, or a GBNF grammar."""

    json_schema: dict[str, Any] | None = Field(None, description="A JSON schema; the answer is JSON that it accepts.")
    grammar: Annotated[str, StringConstraints(min_length=1, max_length=65_536)] | None = Field(
        None, description="A GBNF grammar with the rule root."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.json_schema is None) == (self.grammar is None):
            raise ValueError("give either json_schema or grammar")
        return self

    def output(self) -> OutputFormat:
        """The same, as the layers below take it."""
        return JsonSchema(json.dumps(self.json_schema)) if self.grammar is None else Grammar(self.grammar)


class QueryRequest(StrictRequest):
    """A question, as MQTT payload or HTTP body."""

    query: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=8192),
        AfterValidator(_without_nul),
        AfterValidator(_not_blank),
    ] = Field(description="The question, 1 to 8192 characters.")
    id: EventId | None = Field(None, description="The sender's id of this event; made up when absent.")
    collection: Name = Field("default", description="The collection whose documents are asked.")
    deadline_ms: int | None = Field(
        None, ge=1, le=DAY_MS, description="Answer within this time, degrading to meet it, milliseconds."
    )
    expires_s: float | None = Field(
        None, gt=0, le=YEAR_SECONDS, description="Not worth answering after this time, seconds."
    )
    max_tokens: int | None = Field(None, ge=1, le=4096, description="Longest answer, tokens.")
    priority: Priority = Field("interactive", description="alarm goes before interactive, and that before batch.")
    format: FormatBody | None = Field(None, description="The form the answer is held to.")

    def question(self) -> Question:
        """The same, as the layers below take it."""
        return Question(
            text=self.query,
            collection=self.collection,
            max_tokens=self.max_tokens,
            deadline_seconds=None if self.deadline_ms is None else self.deadline_ms / 1000,
            priority=self.priority,
            output=None if self.format is None else self.format.output(),
        )


class HttpQueryRequest(QueryRequest):
    """A question over HTTP, which can also ask for the answer as it grows."""

    stream: bool = Field(False, description="Answer as server-sent events.")


class DocumentRequest(StrictRequest):
    """A document to add, or to replace the one of the same id."""

    text: Annotated[Text, AfterValidator(_not_blank)] = Field(description="The document's text.")
    id: DocumentId | None = Field(None, description="Its id in the collection; made from the text when absent.")
    title: Annotated[str, StringConstraints(max_length=512), AfterValidator(_without_nul)] | None = Field(
        None, description="Its title; taken from the text when absent."
    )
    format: Literal["markdown", "text"] = Field("text", description="How to read the text.")
    collection: Name = Field("default", description="The collection it belongs to.")


RequestType = TypeVar("RequestType", bound=StrictRequest)


def parse_query(payload: bytes) -> QueryRequest:
    """A question out of an MQTT payload: JSON when it starts with ``{``, else the text itself.

    Raises :class:`RequestError` saying what is wrong, where, and what to do.
    """
    try:
        text = payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the payload is no UTF-8 text: byte {error.start} is 0x{payload[error.start]:02x}",
            hint="send the question as UTF-8 text, or as a JSON object with a 'query'",
            offset=error.start,
        ) from error
    if text.lstrip().startswith("{"):
        return parse_json(text, QueryRequest)
    try:
        return QueryRequest(query=text)
    except ValidationError as error:
        raise explain(error.errors(), QueryRequest.model_fields) from error


class _Named(msgspec.Struct, frozen=True):
    id: Annotated[str, msgspec.Meta(pattern=rf"^{EVENT_ID}\Z")]  # in Python, $ also stands before a last newline


def id_of(payload: bytes) -> str | None:
    """The sender's id in a payload that is no question for another reason, so that the sender learns of it."""
    try:
        return msgspec.json.decode(payload.removeprefix(codecs.BOM_UTF8), type=_Named).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def parse_json(body: str | bytes, model: type[RequestType]) -> RequestType:
    """A request out of a JSON text; :class:`RequestError` names the field and the nearest valid name."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise explain(error.errors(), model.model_fields) from error


def explain(errors: Iterable[Any], known: Iterable[str]) -> RequestError:
    """The first of pydantic's errors in the sender's words; ``known`` are the names that would be right."""
    first = next(iter(errors))
    field = ".".join(str(part) for part in first["loc"])
    reason = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(
            f"the body is no valid JSON: {reason.removeprefix('Invalid JSON: ')}",
            hint='send one JSON object, such as {"query": "…"}',
        )
    if first["type"] == "extra_forbidden":
        return RequestError(f"'{field}': there is no such field", hint=nearest(field, known), field=field)
    if first["type"] == "missing":
        return RequestError(f"'{field}' is missing", hint=f"add '{field}' to the request", field=field)
    if not field:
        return RequestError(f"the body is not usable: {reason}", hint="send one JSON object")
    return RequestError(
        f"'{field}' = {shown(first['input'])}: {reason}",
        hint=f"correct '{field}'; /openapi.json and docs/HTTP.md describe every field",
        field=field,
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint: which of the known names an unknown one was meant to be."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"the fields are {', '.join(names)}"


def shown(value: object) -> str:
    """A refused value, cut to what an error can show."""
    text = repr(value[: SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


# --- answers ---------------------------------------------------------------------------------------


class CitationBody(BaseModel):
    """A sentence the answer stands on; ``start`` and ``end`` are character offsets into the document."""

    sentence_id: str
    chunk_id: int
    document_id: str
    title: str
    headings: list[str]
    text: str
    start: int
    end: int


class TimingsBody(BaseModel):
    """Where the time went, milliseconds."""

    embed_ms: float
    retrieve_ms: float
    queue_ms: float
    prefill_ms: float
    generate_ms: float
    first_token_ms: float | None
    total_ms: float


class AnswerBody(BaseModel):
    """A finished answer. ``note`` says why ``step`` is not ``generated``."""

    id: str
    answer: str
    citations: list[CitationBody]
    step: Step
    note: str
    timings: TimingsBody
    model: str


def answer_body(identifier: str, answer: Answer) -> dict[str, object]:
    """An answer as both doors show it, ready for JSON."""
    body = AnswerBody(
        id=identifier,
        answer=answer.text,
        citations=[CitationBody.model_validate(msgspec.to_builtins(cited)) for cited in answer.citations],
        step=answer.step,
        note=answer.note,
        timings=TimingsBody.model_validate(msgspec.to_builtins(answer.timings)),
        model=answer.model,
    )
    return body.model_dump(mode="json")


def error_body(identifier: str | None, error: EdgedError) -> dict[str, object]:
    """An error as MQTT shows it: the event's ``id`` beside ``error`` (code, message, hint, retryable, facts)."""
    return {"id": identifier, "error": error.body()}


def encode(body: object) -> bytes:
    """A body as compact UTF-8 JSON."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --- documents -------------------------------------------------------------------------------------


class DocumentBody(BaseModel):
    """A stored document without its text; ``added_at`` is Unix time in seconds."""

    id: str
    collection: str
    title: str
    format: str
    sha256: str
    bytes: int
    chunks: int
    added_at: float


class IngestedBody(BaseModel):
    """The document as stored, and whether it was ``added``, ``replaced`` or ``unchanged``."""

    document: DocumentBody
    outcome: Literal["added", "replaced", "unchanged"]


class DocumentsBody(BaseModel):
    """All documents, or those of one collection."""

    documents: list[DocumentBody]


def document_body(document: DocumentInfo) -> DocumentBody:
    """A stored document as the doors show it."""
    return DocumentBody.model_validate(msgspec.to_builtins(document))


def ingested_body(ingested: Ingested) -> IngestedBody:
    """The result of adding a document as the doors show it."""
    return IngestedBody(document=document_body(ingested.document), outcome=ingested.outcome)


# --- status ----------------------------------------------------------------------------------------


class ConditionBody(BaseModel):
    """Something that is not as it should be. ``since`` is Unix time in seconds."""

    code: str
    severity: str
    text: str
    hint: str
    since: float


class WorkerBody(BaseModel):
    """A model and the worker that runs it."""

    model: str
    state: str
    description: str | None = Field(None, description="What llama.cpp calls it, with the type of the weights it has.")
    threads: int | None = None
    pid: int | None = None
    restarts: int = 0
    active: int = Field(0, description="Requests being worked on.")
    queued: int = Field(0, description="Requests waiting.")


class BoundsBody(BaseModel):
    """What a process may use of the device."""

    cores: list[int]
    threads: int = Field(description="Compute threads now.")
    quota_cores: float | None = Field(None, description="CPU time it may use, in cores; null: no limit.")
    weight: int = Field(description="Its share when others compute too (cpu.weight; 100 is everybody else's).")
    memory_high: int | None = Field(None, description="From here on it must give memory back, bytes.")
    memory_max: int | None = Field(None, description="Here it is ended, bytes.")


class HardwareBody(BaseModel):
    """How the device is, and what it lets the workers do."""

    cgroups: bool = Field(description="Whether cgroups hold the processes; else affinity and nice do.")
    placement: dict[str, BoundsBody] = Field(description="By process: daemon, chat, embed.")
    reserved_cores: list[int] = Field(description="Cores that others are kept off.")
    celsius: float | None = Field(None, description="Of the sensor nearest to the point where the CPU is slowed.")
    slowed_at_celsius: float | None = Field(None, description="That point.")
    heat_step: int = Field(description="0: full work; each step up leaves less.")
    memory: Literal["calm", "shedding", "shrinking"] = Field(
        description="shedding: no batch work is taken; shrinking: fewer answers at a time and fewer kept states, too."
    )
    sequences: int | None = Field(None, description="Answers generated at a time, at most, now.")
    longest_answer: int | None = Field(None, description="Tokens of an answer at most, now; null: no limit.")


class EngineBody(BaseModel):
    """The build of llama.cpp that the workers run."""

    gpu: bool = Field(description="Whether it was built for a GPU that is here.")
    backends: dict[str, list[str]] = Field(description="What it was built with: the features of each backend.")


class ProbeBody(BaseModel):
    """What measures the workers, and what it finds of the device in short."""

    linked: bool = Field(description="Whether the probe measures; else the daemon itself does.")
    step: str = Field(description="By which means: ebpf, counters or procfs.")
    reason: str = Field(description="Why not by better ones; empty at the best.")
    score: float = Field(description="Room for work, 0 to 1: the load score of the last ten seconds.")
    cpu_share: float = Field(description="What measuring takes, the kernel's part included, as a share of one core.")
    resident_bytes: int = Field(description="Memory of what measures.")


class EventsBody(BaseModel):
    """The inbox and the outbox, in events."""

    open: int = Field(0, description="Accepted, not yet answered.")
    closed: int = Field(0, description="Answered, failed or expired, and still kept.")
    failed: int = Field(0, description="Of the closed, those answered with an error.")
    expired: int = Field(0, description="Of the closed, those that were no longer worth answering.")
    unpublished: int = Field(0, description="Answers the broker has not taken yet.")


class MqttBody(BaseModel):
    """The connection to the broker. ``protocol`` is ``5`` or ``3.1.1`` while connected."""

    connected: bool
    protocol: str | None = None


class StatusBody(BaseModel):
    """Everything ``/health`` shows."""

    status: str = Field(description="ok, degraded or failing: the worst of the conditions.")
    version: str
    uptime: float = Field(description="Seconds since the start.")
    model_loaded: bool
    vector_store_ready: bool
    conditions: list[ConditionBody]
    chat: WorkerBody
    embed: WorkerBody
    engine: EngineBody | None = Field(None, description="Known once a worker has loaded its model.")
    hardware: HardwareBody | None = None
    probe: ProbeBody | None = Field(None, description="Known once something has been measured.")
    documents: int
    chunks: int
    events: EventsBody
    mqtt: MqttBody

    @property
    def failing(self) -> bool:
        return self.status == "failing"

    @property
    def ready(self) -> bool:
        """Whether questions are taken: nothing fails (starting counts as failing). A missing model degrades."""
        return not self.failing
