"""MQTT packets as the tap between a board and its broker reads them."""

import io

import pytest

from tests.device.tap import PUBACK, PUBLISH, Packet, identity, read_packets

PUBLISH_7 = b"\x32\x0b\x00\x03a/b\x00\x07\x00tex"
ACKNOWLEDGED = b"\x40\x02\x00\x07"


def test_packets_are_read_one_by_one_and_passed_on_as_they_came() -> None:
    packets = list(read_packets(io.BytesIO(PUBLISH_7 + ACKNOWLEDGED)))
    assert [packet.kind for packet in packets] == [PUBLISH, PUBACK]
    assert b"".join(packet.raw for packet in packets) == PUBLISH_7 + ACKNOWLEDGED


def test_a_publish_names_its_packet_id_and_what_it_carries() -> None:
    (packet,) = read_packets(io.BytesIO(PUBLISH_7))
    assert packet.quality == 1
    assert identity(packet) == (7, b"\x00tex")


@pytest.mark.parametrize(
    ("length", "encoded"), [(0, b"\x00"), (127, b"\x7f"), (128, b"\x80\x01"), (16_384, b"\x80\x80\x01")]
)
def test_lengths_of_several_bytes_are_understood(length: int, encoded: bytes) -> None:
    body = b"x" * length
    assert list(read_packets(io.BytesIO(b"\x30" + encoded + body))) == [Packet(0x30, encoded, body)]


@pytest.mark.parametrize("kept", range(1, len(PUBLISH_7)))
def test_a_packet_that_is_cut_off_is_left_out(kept: int) -> None:
    assert list(read_packets(io.BytesIO(ACKNOWLEDGED + PUBLISH_7[:kept]))) == [Packet(0x40, b"\x02", b"\x00\x07")]
