"""Frames between the probe and its clients."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import ProbeError
from edged.probe.protocol import MAX_WATCH_BYTES, MAX_WATCHED, Watch, decode_sample, decode_watch, encode
from edged.probe.sample import Cost, Measured, NodeSample, ProcessSample, Sample, Source, Step, Watched
from edged.workers.protocol import FrameBuffer, FrameError

SAMPLE = Sample(
    at=1.8e9,
    seconds=1.0,
    step=Step.EBPF,
    processes=(
        ProcessSample(name="chat", pid=12, threads=3, cpu_seconds=Measured({0: 0.5, 1: 0.25}, Source.EBPF, 1.0)),
    ),
    node=NodeSample(total_bytes=1 << 30),
    cost=Cost(cpu_seconds=0.001, resident_bytes=1 << 25),
)


def payload_of(frame: bytes) -> bytes:
    (payload,) = FrameBuffer().feed(frame)
    return payload


def test_a_watch_and_a_sample_arrive_as_they_were_sent() -> None:
    watch = Watch((Watched(name="chat", pid=12, group="/edged/chat-12"),))
    assert decode_watch(payload_of(encode(watch))) == watch
    assert decode_sample(payload_of(encode(SAMPLE))) == SAMPLE


def test_another_version_is_refused_by_name_though_nothing_else_can_be_read() -> None:
    strange = msgspec.msgpack.encode({"version": 7, "figures": []})
    for decode in (decode_sample, decode_watch):
        with pytest.raises(ProbeError, match="version 7"):
            decode(strange)


@given(st.binary(max_size=64))
def test_what_is_no_message_is_refused_as_such(payload: bytes) -> None:
    for decode in (decode_sample, decode_watch):
        with pytest.raises((FrameError, ProbeError)):
            decode(payload)


def test_a_client_cannot_make_the_probe_keep_more_than_a_full_watch() -> None:
    full = Watch(tuple(Watched(name="n" * 100, pid=pid, group="g" * 1000) for pid in range(MAX_WATCHED)))
    assert len(FrameBuffer(MAX_WATCH_BYTES).feed(encode(full))) == 1
    with pytest.raises(FrameError):
        FrameBuffer(MAX_WATCH_BYTES).feed((MAX_WATCH_BYTES + 1).to_bytes(4, "little"))
