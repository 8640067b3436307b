"""What the daemon and a worker say to each other: msgpack frames over a Unix stream socket.

A frame is a little-endian u32 length and that many bytes of msgpack: one tagged struct. The daemon listens, the
worker connects and speaks first (:class:`Ready`). Request ids are the daemon's; a worker answers each
:class:`Generate` with pieces and one :class:`Finished` or :class:`Failed`, each :class:`Embed` with one
:class:`Vectors` or :class:`Failed`, each :class:`Inspect` likewise. A cancelled request gets no further frame.
"""

import struct
from typing import Literal, TypeVar

import msgspec

from edged.types import OutputFormat, Priority, Sampling, Segment

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("<I")
M = TypeVar("M")

LoadMode = Literal["mmap", "mlock", "read"]
"""``mmap``: pages come from the file when they are needed, and several processes share them; ``mlock``: so, and they
are kept in memory; ``read``: copied into memory of the process's own."""


class Message(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """Base of everything sent."""


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told on its command line, as JSON.

    ``snapshots`` is the folder for states of stable prefixes ("" for none), ``identity`` names the model file in them.
    ``kv_apart`` gives each sequence ``context_tokens / sequences`` of its own. ``gpu_layers`` of the model are computed
    on a GPU where there is one; -1 is all. ``copy`` is loaded in the place of ``model`` where it can be.
    """

    kind: Literal["chat", "embed"]
    model: str
    copy: str = ""
    threads: int
    context_tokens: int = 8192
    sequences: int = 8
    kv_apart: bool = False
    batch_tokens: int = 256
    queue_limit: int = 256
    prefix_cache_bytes: int = 0
    snapshots: str = ""
    identity: str = ""
    load_mode: LoadMode = "mmap"
    gpu_layers: int = 0


# --- daemon to worker ------------------------------------------------------------------------------


class Generate(Message, frozen=True, kw_only=True):
    """Continue a prompt; ``deadline_seconds`` counts from receipt.

    The first ``prefix_segments`` of the prompt are its stable part, whose state is kept for the next prompt that
    starts with them. With ``keep``, so is that of the whole conversation, for its next turn.
    """

    id: int
    prompt: tuple[Segment, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    output: OutputFormat | None = None
    stop: tuple[str, ...] = ()
    priority: Priority = "interactive"
    prefix_segments: int = 0
    keep: bool = False
    deadline_seconds: float | None = None


class Embed(Message, frozen=True):
    """Turn texts into normalised vectors. A text longer than the model's context is cut at its end."""

    id: int
    texts: tuple[str, ...]


class Cancel(Message, frozen=True):
    """Forget a request; unknown ids are ignored."""

    id: int


class Tune(Message, frozen=True, kw_only=True):
    """How much the worker may do from now on; what runs is left to finish.

    ``sequences`` and ``threads`` are at most those of the settings.
    """

    sequences: int
    threads: int
    prefix_cache_bytes: int


class Inspect(Message, frozen=True):
    """From now on be looked into so, until told otherwise; answered by one :class:`Inspected` or :class:`Failed`.

    ``allocations`` is a file that must not exist, to which memray writes every allocation of memory; empty for none.
    ``tracer`` is a process that may, with those it starts, read the worker's memory (ptrace), as far as its own rights
    go; 0 for none.
    """

    id: int
    allocations: str = ""
    tracer: int = 0


# --- worker to daemon ------------------------------------------------------------------------------


class Ready(Message, frozen=True, kw_only=True):
    """The model is loaded. ``dimensions`` is the length of an embedding, ``system`` llama.cpp's own words on what it
    was built with, ``gpu`` whether it can compute on a GPU here.

    ``locked_bytes`` of the ``model_bytes`` of weights cannot be swapped out.
    """

    pid: int
    description: str
    context_tokens: int
    dimensions: int
    system: str
    gpu: bool = False
    model_bytes: int = 0
    locked_bytes: int = 0


class Alive(Message, frozen=True):
    """A long computation goes on; sent about once a second while busy."""


class Piece(Message, frozen=True):
    """The next text of a generation, never empty."""

    id: int
    text: str


class Finished(Message, frozen=True, kw_only=True):
    """A generation's end: ``stop`` by the model or a stop string, ``length`` by ``max_tokens``.

    ``cached_tokens`` of the prompt were not computed again but taken from an earlier one.
    """

    id: int
    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_ms: float
    prefill_ms: float
    generate_ms: float


class Vectors(Message, frozen=True):
    """Row-major float32 little-endian, ``len(data) // (4 * dimensions)`` vectors of unit length.

    ``tokens`` is how many the texts had together.
    """

    id: int
    dimensions: int
    data: bytes
    tokens: int = 0


class Inspected(Message, frozen=True):
    """An :class:`Inspect` is in force."""

    id: int


class Failed(Message, frozen=True):
    """A request's end without a result. ``code`` is one of the worker errors of :mod:`edged.errors`.

    ``retry_after_seconds`` is when it may well succeed, where that can be told.
    """

    id: int
    code: str
    message: str
    retry_after_seconds: float | None = None


Request = Generate | Embed | Cancel | Tune | Inspect
Reply = Ready | Alive | Piece | Finished | Vectors | Inspected | Failed

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


class FrameError(ValueError):
    """The peer sent what is no frame of this protocol; the connection is of no further use."""


def encode(message: Request | Reply) -> bytes:
    """One message as a frame. Raises :class:`FrameError` when it is too long or its text is no Unicode."""
    try:
        payload = _encoder.encode(message)
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can carry
        raise FrameError(f"a text that UTF-8 cannot hold: {error.reason}") from error
    return frame(payload)


def frame(payload: bytes) -> bytes:
    """A payload with its length before it. Raises :class:`FrameError` when it is too long."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {len(payload)} bytes exceeds the frame limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


def decode_request(payload: bytes) -> Request:
    return _decode(_request_decoder, payload)


def decode_reply(payload: bytes) -> Reply:
    return _decode(_reply_decoder, payload)


def _decode(decoder: msgspec.msgpack.Decoder[M], payload: bytes) -> M:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"not a message of this protocol: {error}") from error


class FrameBuffer:
    """Cuts a byte stream back into payloads of at most ``longest_bytes``."""

    def __init__(self, longest_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._longest_bytes = longest_bytes

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """The payloads completed by ``data``. Raises :class:`FrameError` for a length beyond the limit."""
        self._buffer += data
        payloads = []
        position = 0
        while len(self._buffer) - position >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, position)
            if length > self._longest_bytes:
                raise FrameError(f"a frame of {length} bytes exceeds the limit of {self._longest_bytes}")
            end = position + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[position + _LENGTH.size : end]))
            position = end
        del self._buffer[:position]
        return payloads
