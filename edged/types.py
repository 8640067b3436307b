"""Frozen value objects shared by several layers."""

from typing import Literal

import msgspec


class Sentence(msgspec.Struct, frozen=True):
    """One sentence (or table row, or list item) of a chunk, with its place in the document's text.

    ``start`` and ``end`` are character offsets into the document, end exclusive.
    """

    text: str
    start: int
    end: int


class Chunk(msgspec.Struct, frozen=True):
    """A passage that is retrieved as one: consecutive sentences under one heading path.

    ``headings`` runs from the outermost heading to the innermost.
    """

    ordinal: int
    headings: tuple[str, ...]
    sentences: tuple[Sentence, ...]

    @property
    def start(self) -> int:
        return self.sentences[0].start

    @property
    def end(self) -> int:
        return self.sentences[-1].end

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)


class Passage(msgspec.Struct, frozen=True):
    """A stored chunk as retrieval returns it. ``chunk_id`` is the row id in knowledge.db."""

    chunk_id: int
    document_id: str
    title: str
    headings: tuple[str, ...]
    sentences: tuple[Sentence, ...]


class Citation(msgspec.Struct, frozen=True):
    """A sentence an answer stands on. ``sentence_id`` is ``<chunk_id>.<index in the chunk>``."""

    sentence_id: str
    chunk_id: int
    document_id: str
    title: str
    headings: tuple[str, ...]
    text: str
    start: int
    end: int


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a prompt. Only the template's own pieces (``special``) may become special tokens."""

    text: str
    special: bool = False


Priority = Literal["alarm", "interactive", "batch"]
"""Who goes first. Waiting ages a request upwards, so that none waits for ever."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and
    ``repeat_penalty`` 1 switch theirs off. Without a ``seed`` every run draws its own.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None


class Grammar(msgspec.Struct, frozen=True, tag="grammar"):
    """Text that this GBNF grammar derives from its rule ``root`` (llama.cpp: grammars/README.md)."""

    gbnf: str


class JsonSchema(msgspec.Struct, frozen=True, tag="json_schema"):
    """JSON that this JSON schema, itself JSON text, accepts."""

    schema: str


OutputFormat = Grammar | JsonSchema
"""What a generation is held to, token by token."""


Step = Literal["generated", "reduced", "passages", "unverified", "not_found"]
"""How an answer came about:

``generated`` by the model from the full sentence budget; ``reduced`` with a smaller budget because a deadline
was near; ``passages`` are the sentences themselves, without generation, because there was no time or no model;
``unverified`` are the sentences themselves because the generated text did not stand on them (where a format was asked
for: the generated text, of which ``note`` names what nothing stands for); ``not_found``: no passage was near the
question.
"""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the documents.

    ``evidence`` is text of the event itself (a sensor's reading) that an answer may also stand on.
    ``deadline_seconds`` counts from the moment the question is handed over; an answer degrades to meet it.
    With ``output`` the answer's text is of that format, or there is none.
    """

    text: str
    collection: str = "default"
    max_tokens: int | None = None
    deadline_seconds: float | None = None
    evidence: str = ""
    priority: Priority = "interactive"
    output: OutputFormat | None = None


class Delta(msgspec.Struct, frozen=True):
    """The next piece of an answer while it is being generated."""

    text: str


class Restarted(msgspec.Struct, frozen=True):
    """Everything streamed so far is void: the worker died, or the text did not stand on its sentences."""

    reason: str


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of one answer went, in milliseconds. ``first_token_ms`` counts from the very start."""

    embed_ms: float = 0.0
    retrieve_ms: float = 0.0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    generate_ms: float = 0.0
    first_token_ms: float | None = None
    total_ms: float = 0.0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A finished answer. ``note`` says in a sentence why ``step`` is not ``generated``; empty otherwise."""

    text: str
    citations: tuple[Citation, ...]
    step: Step
    note: str
    model: str
    timings: Timings
    prompt_tokens: int = 0
    completion_tokens: int = 0


AnswerEvent = Delta | Restarted | Answer
"""What a stream of one answer consists of; exactly one :class:`Answer` comes last."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker has done so far, or in some time: of the finished requests, but for ``completion_tokens``, which
    count while an answer grows. ``cached_tokens`` of the prompts were not computed again."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    generate_seconds: float = 0.0


class DocumentInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A stored document without its text. ``added_at`` is Unix time in seconds, ``bytes`` of UTF-8 text."""

    id: str
    collection: str
    title: str
    format: str
    sha256: str
    bytes: int
    chunks: int
    added_at: float


class Ingested(msgspec.Struct, frozen=True, kw_only=True):
    """The result of adding a document: ``added``, ``replaced`` or, at no cost, ``unchanged``."""

    document: DocumentInfo
    outcome: Literal["added", "replaced", "unchanged"]


class TokenSeconds(msgspec.Struct, frozen=True):
    """How long a token took: of a prompt, computed many at a time, and of an answer, one at a time."""

    prompt: float
    answer: float


class Trial(msgspec.Struct, frozen=True):
    """The same work done from a model's file, and from its copy with wider weights."""

    file: TokenSeconds
    copy: TokenSeconds
