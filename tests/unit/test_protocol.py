"""Frames: whole in any cut of the stream, and refused when they are none."""

import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.types import Grammar, JsonSchema, Sampling, Segment
from edged.workers import protocol
from edged.workers.protocol import (
    Alive,
    Cancel,
    Embed,
    Failed,
    Finished,
    FrameBuffer,
    FrameError,
    Generate,
    Inspect,
    Inspected,
    Message,
    Piece,
    Ready,
    Reply,
    Request,
    Tune,
    Vectors,
    WorkerSettings,
    decode_reply,
    decode_request,
    encode,
)

REQUESTS: list[Request] = [
    Generate(id=1, prompt=(Segment("<|im_start|>", special=True), Segment("häh?")), max_tokens=5, stop=("\n",)),
    Generate(
        id=2,
        prompt=(),
        max_tokens=1,
        sampling=Sampling(temperature=0.5, seed=7),
        output=JsonSchema('{"type": "object"}'),
        priority="alarm",
        prefix_segments=3,
        keep=True,
        deadline_seconds=0.25,
    ),
    Generate(id=3, prompt=(), max_tokens=1, output=Grammar('root ::= "a"')),
    Embed(3, ("one", "", "drei °C")),
    Cancel(2**40),
    Tune(sequences=4, threads=2, prefix_cache_bytes=1 << 20),
    Inspect(4, "/run/allocations.memray", tracer=1234),
    Inspect(5),
]
REPLIES: list[Reply] = [
    Ready(pid=1, description="d", context_tokens=2, dimensions=3, system="s"),
    Alive(),
    Piece(1, "text"),
    Finished(
        id=1, reason="length", prompt_tokens=1, completion_tokens=2, queue_ms=0.0, prefill_ms=1.5, generate_ms=2.5
    ),
    Vectors(2, 384, bytes(8)),
    Failed(3, "queue_full", "so it is"),
    Inspected(4),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=repr)
def test_a_request_arrives_as_it_was_sent(request_: Request) -> None:
    (payload,) = FrameBuffer().feed(encode(request_))
    assert decode_request(payload) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=repr)
def test_a_reply_arrives_as_it_was_sent(reply: Reply) -> None:
    (payload,) = FrameBuffer().feed(encode(reply))
    assert decode_reply(payload) == reply


def test_every_message_of_the_protocol_is_tried_here() -> None:
    assert {type(message) for message in (*REQUESTS, *REPLIES)} == set(Message.__subclasses__())


@given(st.lists(st.binary(max_size=30), max_size=8), st.sets(st.integers(0, 250)))
def test_any_cut_of_a_stream_gives_the_same_payloads(payloads: list[bytes], places: set[int]) -> None:
    stream = b"".join(struct.pack("<I", len(payload)) + payload for payload in payloads)
    edges = [0, *sorted(place for place in places if place < len(stream)), len(stream)]
    buffer = FrameBuffer()
    received = [payload for start, end in itertools.pairwise(edges) for payload in buffer.feed(stream[start:end])]
    assert received == payloads


@given(st.binary(max_size=64))
def test_garbage_is_a_frame_error_or_by_chance_a_message(payload: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            assert isinstance(decode(payload), Message)
        except FrameError:
            continue


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "Piece", "id": "one", "text": "x"}),
        msgspec.msgpack.encode({"type": "Nothing"}),
        b"\x83\xa4type\xa5Piece\xa2id\x01\xa4text\xa1\xff",
        b"\x82\xa4type\xa5Piece\xa1x" + b"\x91" * 100_000,
    ],
    ids=["empty", "invalid", "wrong-type", "unknown", "no-utf8", "too-deep"],
)
def test_what_is_no_message_is_refused_by_name(payload: bytes) -> None:
    with pytest.raises(FrameError):
        decode_reply(payload)


def test_a_reply_is_no_request() -> None:
    (payload,) = FrameBuffer().feed(encode(Alive()))
    with pytest.raises(FrameError):
        decode_request(payload)


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() -> None:
    with pytest.raises(FrameError, match="exceeds"):
        FrameBuffer().feed(struct.pack("<I", protocol.MAX_FRAME_BYTES + 1))


def test_a_message_beyond_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="exceeds"):
        encode(Piece(1, "x" * 100))


def test_half_a_surrogate_pair_is_refused_by_name() -> None:
    with pytest.raises(FrameError, match="UTF-8"):
        encode(Embed(1, ("\ud800",)))


def test_settings_survive_the_command_line() -> None:
    settings = WorkerSettings(kind="chat", model="/a b/'ü'.gguf", threads=2, context_tokens=7)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=WorkerSettings) == settings
